#!/bin/busybox sh
# The guest's first process: mounts, modules, then each script in turn.
# Everything a script prints goes to the console, and to the report port, where kernel messages
# cannot tear it. The host reads the GUEST-* and FACT lines of the report.

# The first fork of User-mode Linux may fail, seldom, but many a time in a row on a machine with few
# processors to spare. The shell ends then, and the guest would panic: it begins again instead.
export FORKS=$((${FORKS:-0} + 1))
[ "$FORKS" -gt 50 ] || trap 'exec /bin/busybox sh /init' EXIT
waits=0
while [ "$FORKS" -gt 1 ] && [ "$waits" -lt 20000 ]; do
    waits=$((waits + 1)) # what sleeps would have to be forked
done
/bin/busybox mkdir -p /proc /sys /dev /tmp /mnt /root
trap - EXIT

/bin/busybox --install -s /bin
export PATH=/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
exec </dev/null

REPORT=/dev/ttyS1
stty -F "$REPORT" raw -echo
set -o pipefail
report() { tee "$REPORT"; }

finish() {
    echo "GUEST-RESULT rc=$1" | report
    sync
    poweroff -f
}

load_modules() {
    while read -r module; do
        insmod "/lab/modules/$module.ko" || { echo "cannot insert $module"; return 1; }
    done </lab/modules.list
}

# Waits for virtio devices whose driver is to bind later: one behind a virtio-iommu is put off until
# that is there, and then bound in the background.
wait_for_devices() {
    [ -d /sys/bus/pci/drivers/virtio-pci ] || return 0
    for device in /sys/bus/pci/devices/*; do
        [ "$(cat "$device/vendor")" = 0x1af4 ] || continue
        waits=0
        until [ -e "$device/driver" ] || [ "$waits" -ge 200 ]; do
            usleep 50000
            waits=$((waits + 1))
        done
    done
}

# The type of the domain the disk's DMA goes through: DMA-FQ (lazy) or DMA (strict).
iommu_domain_type() {
    for group in /sys/block/vda/device/../iommu_group /sys/block/vda/device/iommu_group; do
        [ -r "$group/type" ] && { cat "$group/type"; return; }
    done
    echo none
}

{
    load_modules || exit 1
    wait_for_devices
    echo "FACT kernel=$(uname -r)"
    echo "FACT iommu=$(iommu_domain_type)"
    echo "FACT boot_seconds=$(cut -d' ' -f1 /proc/uptime)"
} 2>&1 | report || finish 1

. /lab/environment
while read -r name; do
    echo "GUEST-BEGIN $name" | report
    (cd /root && sh "/lab/scripts/$name") 2>&1 | report
    rc=$?
    echo "GUEST-END $name rc=$rc" | report
    [ "$rc" -eq 0 ] || finish "$rc"
done </lab/scripts.list
finish 0
