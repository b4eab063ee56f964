# QEMU 10.0, libvirt, the tools, and what the other components are built with: packages of the system.

# libvirt's session daemon needs nothing of libvirt-daemon-system, which would start services and make users.
QEMU_PACKAGES=(qemu-system-x86 qemu-utils seabios libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients)
# Lua 5.1 is the one that Argo CD runs health scripts with.
TOOL_PACKAGES=(nbdkit libnbd-bin busybox-static cpio kmod e2fsprogs xz-utils gcc libc6-dev lua5.1)

packages_is_current() {
    dpkg-query -W -f '${db:Status-Status} ${Package} ${Version}\n' "${QEMU_PACKAGES[@]}" "${TOOL_PACKAGES[@]}" 2>/dev/null |
        awk -v wanted=$((${#QEMU_PACKAGES[@]} + ${#TOOL_PACKAGES[@]})) '
            $1 == "installed" { have++ }
            $2 == "qemu-system-x86" { sub(/^[0-9]+:/, "", $3); new = $3 + 0 >= 10 }
            END { exit !(have == wanted && new) }'
}

build_packages() {
    local backports=()
    if [ "$(debian_codename)" = bookworm ]; then
        backports=(-t bookworm-backports)
        if ! grep -rqs '^[^#]*bookworm-backports' /etc/apt/sources.list /etc/apt/sources.list.d --include='*.list' --include='*.sources'; then
            say "packages: adding bookworm-backports to apt's sources"
            cat >/etc/apt/sources.list.d/.virt-fleece-backports.new <<SOURCES
Types: deb
URIs: $(debian_mirror)
Suites: bookworm-backports
Components: main
Signed-By: $(debian_keyring)
SOURCES
            mv /etc/apt/sources.list.d/.virt-fleece-backports.new /etc/apt/sources.list.d/bookworm-backports.sources
        fi
    fi
    say "packages: updating apt's lists"
    update_lists
    say "packages: installing QEMU, libvirt and the tools"
    install_packages "${backports[@]}" "${QEMU_PACKAGES[@]}" "${TOOL_PACKAGES[@]}"
    say "packages: done ($(qemu-system-x86_64 --version | head -n 1))"
}

# install_packages [APT-OPTION]... PACKAGE...
install_packages() {
    (
        # The tests start the daemons they need themselves; a package's own would take the sockets and the memory.
        # Only where nothing guards already: a container image often brings its own guard.
        if [ ! -e /usr/sbin/policy-rc.d ]; then
            trap 'rm -f /usr/sbin/policy-rc.d' EXIT
            printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
            chmod 755 /usr/sbin/policy-rc.d
        fi
        # --no-remove: a machine's other packages are worth more than this test bed.
        quietly env DEBIAN_FRONTEND=noninteractive apt-get -y -o DPkg::Lock::Timeout=600 -o APT::Sandbox::User=root \
            --no-install-recommends --no-remove install "$@"
    )
}
