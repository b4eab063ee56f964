# Go, for the components whose programs are modules of Go.

# go_program: prints the path of a Go that will do; nothing when there is none. Any Go since 1.21 fetches the version
# that a module asks for, once told that it may.
go_program() {
    local go
    for go in "$(command -v go || true)" /usr/local/go/bin/go /usr/bin/go; do
        if [ -x "$go" ] && "$go" version | grep -Eq ' go1\.(2[1-9]|[3-9][0-9])'; then
            echo "$go"
            return
        fi
    done
}

# install_go COMPONENT: unless there is one.
install_go() {
    local backports=()
    [ -z "$(go_program)" ] || return 0
    # It also sees to backports, where they are needed.
    setup packages
    [ "$(debian_codename)" != bookworm ] || backports=(-t bookworm-backports)
    say "$1: installing Go"
    update_lists
    install_packages "${backports[@]}" golang-go ca-certificates
    [ -n "$(go_program)" ] || die "$1: Debian's Go is older than 1.21"
}

# run_go WORK ARGUMENT...: Go with caches of its own, so that nothing stays behind, and only the module's settings.
run_go() {
    local work=$1
    shift
    mkdir -p "$work/tmp"
    env -u GOWORK -u GOROOT -u GOOS -u GOARCH GOFLAGS=-modcacherw GOTOOLCHAIN=auto CGO_ENABLED=0 \
        GOPATH="$work/go" GOMODCACHE="$work/modules" GOCACHE="$work/cache" GOTMPDIR="$work/tmp" "$(go_program)" "$@"
}
