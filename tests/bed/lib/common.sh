# Shared by the components. Sourced, never run.

BED=${VIRT_FLEECE_BED:-$HOME/.cache/virt-fleece-bed}
BED_SOURCE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '[%3ds] %s\n' "$SECONDS" "$*" >&2; }

die() {
    printf 'setup: error: %s\n' "$*" >&2
    exit 1
}

# Runs a command without its output, which is shown when it fails.
quietly() {
    local log
    log=$(mktemp)
    if ! "$@" >"$log" 2>&1; then
        tail -n 40 "$log" >&2
        rm -f "$log"
        die "this failed: $*"
    fi
    rm -f "$log"
}

# What a component is made from: the hash of the contents of these files.
key_of() { cat "$@" | sha256sum | cut -c 1-16; }

is_current() { [ "$(cat "$BED/$1/.key" 2>/dev/null)" = "$2" ]; }

# A directory beside the component's place, so that moving it there is one rename. What an earlier run that was
# killed left behind goes first: whoever calls this holds the component's lock.
new_directory() {
    rm -rf "$BED/.new-$1" "$BED/.old-$1"
    mkdir -p "$BED/.new-$1"
    echo "$BED/.new-$1"
}

# publish COMPONENT KEY DIRECTORY: moves the finished component to its place.
publish() {
    printf '%s\n' "$2" >"$3/.key"
    rm -rf "$BED/.old-$1"
    [ ! -e "$BED/$1" ] || mv -T "$BED/$1" "$BED/.old-$1"
    mv -T "$3" "$BED/$1"
    rm -rf "$BED/.old-$1"
}

# setup COMPONENT: builds it unless it is there. Two runs at once: one builds and the other waits for the result.
setup() {
    local component=$1 name=${1//-/_}
    "${name}_is_current" && return
    (
        exec {lock}>"$BED/.lock-$component"
        flock -n "$lock" || {
            say "$component: another setup is at it, waiting"
            flock "$lock"
        }
        "${name}_is_current" || "build_$name"
    )
    "${name}_is_current" || die "$component is still not there"
}

debian_codename() { (. /etc/os-release && echo "${VERSION_CODENAME:-}"); }

# The system's own Debian archive, from apt's sources: debian_source URIs, or debian_source Signed-By.
debian_source() {
    local file
    for file in /etc/apt/sources.list.d/*.sources; do
        [ -e "$file" ] || continue
        awk -v field="$1:" -v suite="$(debian_codename)" '
            function finish() { if (debian && value != "") { print value; exit } debian = 0; value = "" }
            NF == 0 { finish() }
            $1 == field { value = $2 }
            $1 == "Suites:" { for (i = 2; i <= NF; i++) if ($i == suite) debian = 1 }
            END { finish() }' "$file"
    done | head -n 1
}

debian_mirror() {
    local uri
    uri=$(debian_source URIs)
    [ -n "$uri" ] || uri=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null |
        sed -n "s/^deb \(\[[^]]*\] \)\?\([^ ]*\) $(debian_codename) .*/\2/p" | head -n 1)
    [ -n "$uri" ] || die "apt's sources name no archive of Debian"
    echo "$uri"
}

debian_keyring() {
    local keyring
    keyring=$(debian_source Signed-By)
    case $keyring in /*) ;; *) keyring=/usr/share/keyrings/debian-archive-keyring.gpg ;; esac
    echo "$keyring"
}

# apt's own lock timeout covers dpkg's locks but not the one on the package lists, hence the tries.
update_lists() {
    local try
    for try in 1 2 3 4 5; do
        [ "$try" = 5 ] || apt-get -qq -o DPkg::Lock::Timeout=300 update >/dev/null 2>&1 && return
        sleep $((try * 5))
    done
    quietly apt-get -o DPkg::Lock::Timeout=300 update
}
