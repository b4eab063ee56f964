# Shared by the components. Sourced, never run.

BED=${VIRT_FLEECE_BED:-$HOME/.cache/virt-fleece-bed}
BED_SOURCE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BED_STARTED=$(date +%s)

say() { printf '[%4ds] %s\n' "$(($(date +%s) - BED_STARTED))" "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Runs a command quietly; its output is shown when it fails.
quietly() {
    local log
    log=$(mktemp)
    if ! "$@" >"$log" 2>&1; then
        tail -n 40 "$log" >&2
        rm -f "$log"
        die "failed: $*"
    fi
    rm -f "$log"
}

# The hash of files and words: what a cached component was made from.
key_of() { { for f in "$@"; do if [ -f "$f" ]; then cat "$f"; else printf '%s\n' "$f"; fi; done; } | sha256sum | cut -c1-16; }

# is_current COMPONENT KEY: the component is there and was made from this.
is_current() { [ "$(cat "$BED/$1/.key" 2>/dev/null)" = "$2" ]; }

# publish COMPONENT KEY DIR: moves a finished component to its place.
publish() {
    printf '%s' "$2" >"$3/.key"
    rm -rf "${BED:?}/$1.old"
    [ ! -e "$BED/$1" ] || mv "$BED/$1" "$BED/$1.old"
    mv "$3" "$BED/$1"
    rm -rf "${BED:?}/$1.old"
}

# The mirror and keyring of the Debian that runs here.
debian_sources() { ls /etc/apt/sources.list.d/*.sources 2>/dev/null | xargs -r grep -l 'Suites: *[a-z]* ' | head -n1; }
debian_mirror() { { grep -hm1 '^URIs:' /etc/apt/sources.list.d/debian.sources 2>/dev/null || echo 'URIs: http://deb.debian.org/debian'; } | awk '{print $2}'; }
debian_keyring() { echo /usr/share/keyrings/debian-archive-keyring.gpg; }

# apt with a state of its own for another suite, so that nothing of it can reach the system.
# private_apt SUITE COMMAND...
private_apt() {
    local suite=$1 root=$BED/apt-$1
    shift
    mkdir -p "$root"/{state/lists/partial,cache/archives/partial,etc/preferences.d,etc/apt.conf.d}
    : >"$root/status"
    cat >"$root/etc/sources.list" <<LIST
deb [signed-by=$(debian_keyring)] $(debian_mirror) $suite main
deb-src [signed-by=$(debian_keyring)] $(debian_mirror) $suite main
LIST
    local apt=(-o "Dir::State=$root/state" -o "Dir::State::status=$root/status" -o "Dir::Cache=$root/cache"
        -o "Dir::Etc::sourcelist=$root/etc/sources.list" -o "Dir::Etc::sourceparts=-" -o "Dir::Etc::preferencesparts=-"
        -o "APT::Sandbox::User=root" -o "Acquire::Languages=none" -o "APT::Get::List-Cleanup=false" -o "APT::Architecture=amd64")
    local tool=apt-get
    case $1 in policy | show | depends) tool=apt-cache ;; esac
    "$tool" "${apt[@]}" "$@"
}
