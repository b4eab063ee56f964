# The newest QEMU of a newer Debian suite, in a root of its own that nothing is installed into: its packages and
# everything they depend on are unpacked there, and it runs with that root's loader and libraries.

qemu_next_key() { key_of "$BED_SOURCE"/lib/{suites,qemu-next}.sh; }

qemu_next_is_current() { is_current qemu-next "$(qemu_next_key)"; }

build_qemu_next() {
    local work root version set upstream debs deb
    work=$(new_directory qemu-next)
    root=$work/out/root
    mkdir -p "$work/debs/partial" "$root"
    read -r version set upstream < <(binary_versions qemu-system-x86) || true
    [ -n "$version" ] || die "qemu-next: apt finds no QEMU in ${NEWER_SUITES[*]}"
    at_least "$upstream" 10.1 || die "qemu-next: the newest QEMU of ${NEWER_SUITES[*]} is $version, older than 10.1"

    say "qemu-next: fetching QEMU $version of Debian $set and what it depends on"
    # The dpkg status being empty, apt takes the whole closure, libc included.
    quietly suite_apt "$set" apt-get -y --no-install-recommends --download-only -o Dir::Cache::archives="$work/debs" \
        install "qemu-system-x86=$version"
    debs=("$work"/debs/*.deb)
    [ -e "${debs[0]}" ] || die "qemu-next: apt fetched no package"

    say "qemu-next: unpacking ${#debs[@]} packages"
    # Merged /usr, as an installed Debian has it: packages name their files either way.
    mkdir -p "$root"/usr/{bin,sbin,lib,lib64}
    ln -s usr/bin usr/sbin usr/lib usr/lib64 "$root/"
    for deb in "${debs[@]}"; do
        # tar and not dpkg-deb -x, which would put a directory where the links above are.
        dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$root" --keep-directory-symlink --no-same-owner \
            --exclude='./usr/share/doc' --exclude='./usr/share/man' --exclude='./usr/share/locale'
    done

    # Proven before it is put in place, since the wrapper names the place it will have.
    write_next_wrapper "$root" "$work/wrapper"
    quietly "$work/wrapper" --version
    write_next_wrapper "$BED/qemu-next/root" "$work/out/qemu"
    printf '%s\n' "$upstream" >"$work/out/version"
    publish qemu-next "$(qemu_next_key)" "$work/out"
    rm -rf "$work"
    say "qemu-next: done ($("$BED/qemu-next/qemu" --version | head -n 1))"
}

# write_next_wrapper ROOT TO
write_next_wrapper() {
    # --inhibit-cache: the cache is of the system's libraries, which must not be mixed with this root's.
    # The modules' directory has to be named, because QEMU derives it from the running program, and that is the loader.
    cat >"$2" <<WRAPPER
#!/bin/sh
export QEMU_MODULE_DIR=$1/usr/lib/x86_64-linux-gnu/qemu
exec $1/lib64/ld-linux-x86-64.so.2 --inhibit-cache --library-path $1/usr/lib/x86_64-linux-gnu \\
    $1/usr/bin/qemu-system-x86_64 -L $1/usr/share/seabios -L $1/usr/share/qemu "\$@"
WRAPPER
    chmod 755 "$2"
}
