# QEMU 10.0, libvirt and the tools, as packages of the system from bookworm-backports.

PACKAGES=(qemu-system-x86 qemu-utils libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients seabios nbdkit
    libnbd-bin busybox-static cpio kmod e2fsprogs)

setup_packages() {
    local missing=() package
    for package in "${PACKAGES[@]}"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    if [ ${#missing[@]} -eq 0 ] && qemu-system-x86_64 --version | grep -qE 'version (1[0-9])\.'; then
        return
    fi
    say "installing ${missing[*]:-a newer QEMU} (Debian bookworm-backports)"
    if ! grep -rqs 'bookworm-backports' /etc/apt/sources.list.d /etc/apt/sources.list; then
        cat >/etc/apt/sources.list.d/bookworm-backports.sources <<SOURCES
Types: deb
URIs: $(debian_mirror)
Suites: bookworm-backports
Components: main
Signed-By: $(debian_keyring)
SOURCES
    fi
    quietly apt-get -o DPkg::Lock::Timeout=300 update
    # The daemons are started by the tests, as they need them: not by their packages.
    local guard=/usr/sbin/policy-rc.d made=
    if [ ! -e $guard ]; then
        printf '#!/bin/sh\nexit 101\n' >$guard
        chmod +x $guard
        made=1
    fi
    quietly env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends \
        -t bookworm-backports "${PACKAGES[@]}"
    [ -z "$made" ] || rm -f $guard
    qemu-system-x86_64 --version | head -n1 >&2
}
