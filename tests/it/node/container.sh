# Runs a container of the stand-in for the kubelet, as root: in a mount namespace of its own, on a root file system made
# of the machine's own programs, read-only. Left out: images, cgroups, network and pid namespaces, seccomp.
#
#   container.sh ROOT BINARY UID:GID TERMINATION-LOG [SOURCE:TARGET[:ro]]... -- ARGUMENT...
set -euo pipefail
root=$1 binary=$2 user=$3 termination=$4
shift 4

mount -t tmpfs -o mode=755 tmpfs "$root"
for name in usr etc opt; do
    [ -d "/$name" ] && mkdir "$root/$name" && mount --bind -o ro "/$name" "$root/$name"
done
for name in lib lib64 bin sbin; do
    if [ -L "/$name" ]; then cp -P "/$name" "$root/$name"; elif [ -d "/$name" ]; then
        mkdir "$root/$name" && mount --bind -o ro "/$name" "$root/$name"
    fi
done
mkdir -p "$root/proc" "$root/sys" "$root/dev" "$root/tmp"
mount --rbind /proc "$root/proc"
mount --rbind /sys "$root/sys"
attach() { # attach SOURCE TARGET [ro]
    local target=$root$2
    if [ -d "$1" ]; then mkdir -p "$target"; else
        mkdir -p "${target%/*}" && : >"$target"
    fi
    mount --bind "$1" "$target"
    [ "${3:-}" != ro ] || mount -o remount,bind,ro "$target"
}
for name in null zero urandom random; do attach "/dev/$name" "/dev/$name"; done
attach "$termination" /dev/termination-log
attach "$binary" /virt-fleece
while [ "$1" != -- ]; do
    IFS=: read -r source target mode <<<"$1"
    attach "$source" "$target" "$mode"
    shift
done
shift
mount -o remount,ro "$root"
exec chroot --userspec="$user" --groups="${user#*:}" "$root" /virt-fleece "$@"
