# Newer Debian suites, looked into without touching the system: apt with a state, sources and a dpkg status of its
# own. Mixing suites on the system would change the QEMU and the libc that the tests are about.

# A release before the newest one, with its backports, comes first: of two equal versions the one built for a released
# libc is taken. A word per set of suites.
NEWER_SUITES=(trixie,trixie-backports testing sid)

# suite_apt SET TOOL [ARGUMENT]...: apt-get or apt-cache, looking at that set of suites only.
suite_apt() {
    local set=$1 tool=$2 root=$BED/suites/$1
    shift 2
    "$tool" -qq -o Dir::State="$root/state" -o Dir::State::status="$root/status" -o Dir::Cache="$root/cache" \
        -o Dir::Etc::sourcelist="$root/sources.list" -o Dir::Etc::sourceparts=- -o Dir::Etc::preferences="$root/preferences" \
        -o Dir::Etc::preferencesparts=- -o APT::Sandbox::User=root -o Acquire::Languages=none -o Acquire::Retries=3 \
        -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false \
        -o Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false -o APT::Architecture=amd64 "$@"
}

# Fetches the package lists of a set, at most once an hour and by one run at a time. Fails when the archive has no
# such suite.
suite_update() {
    local set=$1 root=$BED/suites/$1 keyring mirror suite
    keyring=$(debian_keyring)
    mirror=$(debian_mirror)
    mkdir -p "$root"/{state/lists/partial,cache/archives/partial}
    (
        exec {lock}>"$root/lock"
        flock "$lock"
        # An hour: both components that look here are usually built one after the other.
        [ -z "$(find "$root/updated" -mmin -60 2>/dev/null)" ] || exit 0
        : >"$root/status"
        for suite in ${set//,/ }; do
            printf 'deb [signed-by=%s] %s %s main\n' "$keyring" "$mirror" "$suite"
            printf 'deb-src [signed-by=%s] %s %s main\n' "$keyring" "$mirror" "$suite"
        done >"$root/sources.list"
        # Backports are not taken by themselves; 500 makes them equal, and then the newest version wins.
        printf 'Package: *\nPin: release n=*-backports\nPin-Priority: 500\n' >"$root/preferences"
        say "looking into Debian $set"
        suite_apt "$set" apt-get update >"$root/log" 2>&1 && touch "$root/updated"
    )
}

# Prints "VERSION SET UPSTREAM", the best first, of what the newer suites have of a package: binary_versions PACKAGE,
# or source_versions PACKAGE.
binary_versions() { suite_versions Packages "$1"; }
source_versions() { suite_versions Sources "$1"; }
suite_versions() {
    local set order=0
    for set in "${NEWER_SUITES[@]}"; do
        suite_update "$set" || continue
        suite_apt "$set" apt-cache madison "$2" | awk -F ' *[|] *' -v kind="$1" \
            '$3 ~ (kind "$") { print $2 }' | sort -uV | sed "s/^/$order $set /"
        order=$((order + 1))
    done | awk '{ upstream = $3; sub(/^[0-9]+:/, "", upstream); sub(/[^0-9.].*/, "", upstream); print upstream, $1, $2, $3 }' |
        sort -k 1,1Vr -k 2,2n -k 4,4Vr | awk '{ print $4, $3, $1 }'
}

# at_least VERSION WANTED
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }
