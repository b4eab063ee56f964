# QEMU as stock KubeVirt runs it: a version that has blockdev-backup's on-cbw-error (10.1), and CentOS Stream's list of
# block drivers. The lists are those of the qemu-kvm package there; no Debian binary is built with any.

ALLOWLIST_RW=qcow2,raw,file,host_device,nbd,iscsi,rbd,blkdebug,luks,null-co,nvme,copy-on-read,throttle,compress
ALLOWLIST_RW+=,virtio-blk-vhost-vdpa,virtio-blk-vfio-pci,virtio-blk-vhost-user,io_uring,nvme-io_uring
ALLOWLIST_RO=vdi,vmdk,vhdx,vpc,https

ALLOWLIST_BUILD_PACKAGES=(gcc g++ libc6-dev make ninja-build pkg-config flex bison dpkg-dev xz-utils python3 python3-venv
    libglib2.0-dev zlib1g-dev libzstd-dev libaio-dev liburing-dev)

qemu_allowlist_key() { key_of "$BED_SOURCE"/lib/{suites,qemu-allowlist}.sh; }

qemu_allowlist_is_current() { is_current qemu-allowlist "$(qemu_allowlist_key)"; }

# Prints "VERSION SET UPSTREAM" of the source to build: the oldest that is new enough, being nearest to the 10.1 of
# KubeVirt's images; where no archive has one, the newest there is, and the env file tells.
allowlist_source() {
    source_versions qemu | awk '
        function new_enough(v, part) { split(v, part, "."); return part[1] > 10 || (part[1] == 10 && part[2] >= 1) }
        NR == 1 { best = $0 }
        new_enough($3) { best = $0 }
        END { if (best != "") print best }'
}

build_qemu_allowlist() {
    setup packages
    local work source version set upstream place=$BED/qemu-allowlist
    work=$(new_directory qemu-allowlist)
    read -r version set upstream < <(allowlist_source) || true
    [ -n "$version" ] || die "qemu-allowlist: apt finds no source of QEMU in ${NEWER_SUITES[*]}"
    at_least "$upstream" 10.1 || say "qemu-allowlist: no source >= 10.1: $upstream has no on-cbw-error"

    say "qemu-allowlist: fetching the source of QEMU $version of Debian $set and what builds it"
    install_packages "${ALLOWLIST_BUILD_PACKAGES[@]}"
    (
        cd "$work"
        quietly suite_apt "$set" apt-get source --download-only "qemu=$version"
        quietly dpkg-source --no-check --extract ./qemu_*.dsc source
    )
    source=$work/source
    # QEMU asks for a newer meson than Debian bookworm has. The system's Python, whose venv module is installed above:
    # another one in PATH may be of any version and lack parts.
    /usr/bin/python3 -m venv "$work/venv"
    quietly "$work/venv/bin/pip" install --quiet 'meson>=1.8.1,<2' distlib setuptools wheel

    say "qemu-allowlist: configuring"
    mkdir -p "$work/build" "$work/out/bin"
    allowlist_fill_blobs "$source"
    (
        cd "$work/build"
        # Its environment may carry flags for another build.
        quietly env -u CFLAGS -u CXXFLAGS -u LDFLAGS PATH="$work/venv/bin:/usr/sbin:/usr/bin:/sbin:/bin" \
            "$source/configure" --python="$work/venv/bin/python" --target-list=x86_64-softmmu --without-default-features \
            --enable-tcg --enable-linux-aio --enable-linux-io-uring --enable-zstd --enable-coroutine-pool \
            --enable-vdi --enable-vmdk --enable-vhdx --enable-vpc \
            --block-drv-rw-whitelist="$ALLOWLIST_RW" --block-drv-ro-whitelist="$ALLOWLIST_RO" \
            --audio-drv-list= --disable-install-blobs --disable-docs --disable-werror --disable-debug-info --disable-download
    )
    say "qemu-allowlist: compiling (some minutes)"
    (cd "$work/build" && quietly env -u MAKEFLAGS PATH="$work/venv/bin:/usr/sbin:/usr/bin:/sbin:/bin" ninja qemu-system-x86_64)
    install -m 755 -s "$work/build/qemu-system-x86_64" "$work/out/bin/"
    # The firmware is not in Debian's source; that of the system's packages fits any version.
    cat >"$work/out/qemu" <<WRAPPER
#!/bin/sh
exec $place/bin/qemu-system-x86_64 -L /usr/share/seabios -L /usr/share/qemu "\$@"
WRAPPER
    chmod 755 "$work/out/qemu"
    printf '%s\n' "$upstream" >"$work/out/version"
    quietly "$work/out/bin/qemu-system-x86_64" --version
    publish qemu-allowlist "$(qemu_allowlist_key)" "$work/out"
    rm -rf "$work"
    say "qemu-allowlist: done ($("$BED/qemu-allowlist/qemu" --version | head -n 1))"
}

# Debian removes the firmware from QEMU's source, yet its build rules name the files as inputs. They are not installed
# and not used, so empty ones do.
allowlist_fill_blobs() {
    local name
    for name in $(sed -n "/^blobs = \[/,/^\]/ s/^ *'\([^']*\)',\?$/\1/p" "$1/pc-bios/meson.build"); do
        [ -e "$1/pc-bios/$name" ] || : >"$1/pc-bios/$name"
    done
}
