# An S3 server: versitygw with its POSIX backend, where a bucket is a directory. One process without other services,
# and the key is locked between the check of `If-None-Match: *` and the publication (since 1.8.0), as with S3 itself.

S3_MODULE=github.com/versity/versitygw
S3_VERSION=1.8.0
# Of the whole module, its go.sum included: so it pins what the server is built from, without a go.sum of our own.
S3_SUM='h1:au+wI+aybno/STsQiSm35Uu6Q6iK5MWReQxgO6SEMFc='

s3_key() { key_of "$BED_SOURCE/lib/s3.sh"; }

s3_is_current() { is_current s3 "$(s3_key)"; }

build_s3() {
    local work module
    install_go s3
    work=$(new_directory s3)
    mkdir -p "$work"/{tmp,out}

    say "s3: fetching $S3_MODULE $S3_VERSION"
    # Downloads outside a module, since a module's own go.mod is not to be changed.
    cd "$work/tmp"
    quietly run_go "$work" mod download -json "$S3_MODULE@v$S3_VERSION"
    module=$(run_go "$work" mod download -json "$S3_MODULE@v$S3_VERSION")
    grep -qF "\"Sum\": \"$S3_SUM\"" <<<"$module" || die "s3: $S3_MODULE $S3_VERSION is not what was pinned: $module"

    say "s3: compiling (some minutes)"
    # As the main module its go.sum is binding: -mod=readonly adds nothing to it.
    cd "$work/modules/$S3_MODULE@v$S3_VERSION"
    quietly run_go "$work" build -mod=readonly -buildvcs=false -trimpath -ldflags "-s -w -X main.Version=$S3_VERSION" \
        -o "$work/out/versitygw" ./cmd/versitygw
    cd /
    quietly "$work/out/versitygw" --version
    printf '%s\n' "$S3_VERSION" >"$work/out/version"
    publish s3 "$(s3_key)" "$work/out"
    rm -rf "$work"
    say "s3: done ($(du -h "$BED/s3/versitygw" | cut -f 1), version $S3_VERSION)"
}
