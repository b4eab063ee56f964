# Kernel and initramfs of the guest. Nothing of it is installed: the packages are only unpacked.

# Where a kernel package lacks one of these (or has it built in), the guest does without.
GUEST_MODULES=(virtio_pci virtio_console virtio_blk virtio_scsi sd_mod ahci button evdev ext4)

guest_key() { key_of "$BED_SOURCE"/{writer.c,init,lib/guest.sh}; }

guest_is_current() { is_current guest "$(guest_key)"; }

# Copies a dynamic program and the libraries it needs on this system.
copy_program() {
    local from=$1 to=$2 root=$3 library
    install -D -m 755 "$from" "$root/$to"
    ldd "$from" | grep -o '/[^ ]*' | while read -r library; do
        install -D -m 755 "$library" "$root/$library"
    done
}

build_guest() {
    setup packages
    local work tree kernel
    work=$(new_directory guest)
    tree=$work/tree
    mkdir -p "$work"/{debs,kernel,agent,out} "$tree"/{bin,sbin,modules,etc,lib,lib64}

    say "guest: fetching the kernel and the agent"
    # The metapackage depends on the kernel of the day.
    kernel=$(LC_ALL=C apt-cache depends --important linux-image-cloud-amd64 2>/dev/null |
        sed -n 's/^ *Depends: \(linux-image-[0-9][^ ]*\)$/\1/p' | head -n 1)
    [ -n "$kernel" ] || die "guest: apt knows no linux-image-cloud-amd64"
    (cd "$work/debs" && quietly apt-get -o APT::Sandbox::User=root download "$kernel" qemu-guest-agent)
    dpkg-deb -x "$work"/debs/linux-image-*.deb "$work/kernel"
    dpkg-deb -x "$work"/debs/qemu-guest-agent_*.deb "$work/agent"
    install -m 644 "$work"/kernel/boot/vmlinuz-* "$work/out/kernel"

    say "guest: building the initramfs ($kernel)"
    add_modules "$work/kernel" "$tree/modules"
    quietly gcc -std=gnu11 -O2 -static -pthread -Wall -Wextra -o "$tree/bin/writer" "$BED_SOURCE/writer.c"
    strip "$tree/bin/writer"
    install -m 755 /bin/busybox "$tree/bin/busybox"
    "$tree/bin/busybox" --list | grep -qx insmod || die "guest: /bin/busybox is not busybox-static's"
    copy_program "$work/agent/usr/sbin/qemu-ga" sbin/qemu-ga "$tree"
    copy_program "$(command -v mke2fs || echo /sbin/mke2fs)" sbin/mke2fs "$tree"
    install -m 644 /etc/mke2fs.conf "$tree/etc/mke2fs.conf"
    install -m 755 "$BED_SOURCE/init" "$tree/init"
    # Not compressed: unpacking costs more under emulation than loading.
    (cd "$tree" && find . -print0 | cpio --quiet --null --create --format=newc --owner=0:0) >"$work/out/initrd"
    publish guest "$(guest_key)" "$work/out"
    rm -rf "$work"
    say "guest: done ($(du -h "$BED/guest/initrd" | cut -f 1) initramfs)"
}

# add_modules UNPACKED-KERNEL TO: the modules and what they depend on, and a file with the order to load them in.
add_modules() {
    local root=$1 to=$2 version module path
    version=$(basename "$root"/lib/modules/*)
    depmod -b "$root" "$version"
    for module in "${GUEST_MODULES[@]}"; do
        modprobe -d "$root" -S "$version" --show-depends "$module" 2>/dev/null || true
    done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' | while read -r path; do
        case $path in
        *.xz) xz -dc "$path" >"$to/$(basename "$path" .xz)" ;;
        *.zst) zstd -qdc "$path" >"$to/$(basename "$path" .zst)" ;;
        *) cp "$path" "$to/" ;;
        esac
        basename "$path" | sed 's/\.\(xz\|zst\)$//' >>"$to/order"
    done
    for module in virtio_blk virtio_scsi virtio_console; do
        grep -qx "$module.ko" "$to/order" || die "guest: the kernel has no module $module"
    done
}
