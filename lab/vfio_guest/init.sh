#!/bin/busybox sh
# The VFIO guest's first process: mounts the host's root file system read-only over 9p, makes it
# writable by an overlay in memory, hands the lab's devices to vfio-pci, and runs the job in it.
# The job's output goes to the report port; the host reads its last line.
/bin/busybox mkdir -p /proc /sys /dev /lower /upper /new
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2>/dev/null
exec </dev/null

REPORT=/dev/ttyS1
stty -F "$REPORT" raw -echo

finish() {
    # Whatever was printed last may lack the end of its line.
    printf '\nGUEST-RESULT rc=%s\n' "$1" >"$REPORT"
    sync
    poweroff -f
}
die() {
    echo "lab: $*" | tee "$REPORT"
    finish 125
}

while read -r module; do
    insmod "/lab/modules/$module.ko" || die "cannot insert $module"
done </lab/modules.list

mount -t 9p -o trans=virtio,version=9p2000.L,msize=1048576,cache=loose,ro host /lower ||
    die "cannot mount the host's root"
mount -t tmpfs -o mode=755 upper /upper
mkdir /upper/data /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work root /new ||
    die "cannot put an overlay over the host's root"
mount -t proc proc /new/proc
mount -t sysfs sysfs /new/sys
mount --bind /dev /new/dev
mkdir -p /new/dev/pts /new/dev/shm
mount -t devpts devpts /new/dev/pts
mount -t tmpfs shm /new/dev/shm
mount -t tmpfs -o mode=755 run /new/run
for link in fd:/proc/self/fd stdin:/proc/self/fd/0 stdout:/proc/self/fd/1 stderr:/proc/self/fd/2; do
    [ -e "/dev/${link%%:*}" ] || ln -s "${link#*:}" "/dev/${link%%:*}"
done

for device in /sys/bus/pci/devices/*; do
    id="$(cat "$device/vendor"):$(cat "$device/device")"
    if grep -qx "$id" /lab/assigned.list; then
        echo vfio-pci >"$device/driver_override"
        echo "${device##*/}" >/sys/bus/pci/drivers_probe || die "cannot give $id to vfio-pci"
    fi
done

cp /lab/job.sh /new/run/lab-job.sh
chroot /new /bin/sh /run/lab-job.sh >"$REPORT" 2>&1
finish $?
