# An S3 server: versitygw with its POSIX backend, where a bucket is a directory. One process without other services,
# and the key is locked between the check of `If-None-Match: *` and the publication (since 1.8.0), as with S3 itself.

S3_MODULE=github.com/versity/versitygw
S3_VERSION=1.8.0
# Of the whole module, its go.sum included: so it pins what the server is built from, without a go.sum of our own.
S3_SUM='h1:au+wI+aybno/STsQiSm35Uu6Q6iK5MWReQxgO6SEMFc='

s3_key() { key_of "$BED_SOURCE/lib/s3.sh"; }

s3_is_current() { is_current s3 "$(s3_key)"; }

# Any Go since 1.21 fetches the version that the module asks for, once told that it may.
s3_go() {
    local go
    for go in "$(command -v go || true)" /usr/local/go/bin/go /usr/bin/go; do
        if [ -x "$go" ] && "$go" version | grep -Eq ' go1\.(2[1-9]|[3-9][0-9])'; then
            echo "$go"
            return
        fi
    done
}

# s3_run_go WORK ARGUMENT...: Go with caches of its own, so that nothing stays behind, and only the module's settings.
s3_run_go() {
    local work=$1
    shift
    env -u GOWORK -u GOROOT -u GOOS -u GOARCH GOFLAGS=-modcacherw GOTOOLCHAIN=auto CGO_ENABLED=0 \
        GOPATH="$work/go" GOMODCACHE="$work/modules" GOCACHE="$work/cache" GOTMPDIR="$work/tmp" "$S3_GO" "$@"
}

build_s3() {
    local work module S3_GO backports=()
    S3_GO=$(s3_go)
    if [ -z "$S3_GO" ]; then
        # It also sees to backports, where they are needed.
        setup packages
        [ "$(debian_codename)" != bookworm ] || backports=(-t bookworm-backports)
        say "s3: installing Go"
        update_lists
        install_packages "${backports[@]}" golang-go ca-certificates
        S3_GO=$(s3_go)
        [ -n "$S3_GO" ] || die "s3: Debian's Go is older than 1.21"
    fi
    work=$(new_directory s3)
    mkdir -p "$work"/{tmp,out}

    say "s3: fetching $S3_MODULE $S3_VERSION"
    # Downloads outside a module, since a module's own go.mod is not to be changed.
    cd "$work/tmp"
    quietly s3_run_go "$work" mod download -json "$S3_MODULE@v$S3_VERSION"
    module=$(s3_run_go "$work" mod download -json "$S3_MODULE@v$S3_VERSION")
    grep -qF "\"Sum\": \"$S3_SUM\"" <<<"$module" || die "s3: $S3_MODULE $S3_VERSION is not what was pinned: $module"

    say "s3: compiling (some minutes)"
    # As the main module its go.sum is binding: -mod=readonly adds nothing to it.
    cd "$work/modules/$S3_MODULE@v$S3_VERSION"
    quietly s3_run_go "$work" build -mod=readonly -buildvcs=false -trimpath -ldflags "-s -w -X main.Version=$S3_VERSION" \
        -o "$work/out/versitygw" ./cmd/versitygw
    cd /
    quietly "$work/out/versitygw" --version
    printf '%s\n' "$S3_VERSION" >"$work/out/version"
    publish s3 "$(s3_key)" "$work/out"
    rm -rf "$work"
    say "s3: done ($(du -h "$BED/s3/versitygw" | cut -f 1), version $S3_VERSION)"
}
