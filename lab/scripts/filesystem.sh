# programs: mke2fs e2fsck
# Makes an ext4 file system, fills it, and checks its files from the device, before and after a
# remount, trims it where the disk can discard, and lets e2fsck judge the result.
#   DISK   block device, wiped (/dev/vda)
#   FILES  number of files (40)
: "${DISK:=/dev/vda}" "${FILES:=40}"
set -eu

verify() {
    echo 3 >/proc/sys/vm/drop_caches
    (cd /mnt && sha256sum -c -s /tmp/sums) || { echo "files differ $1"; exit 1; }
}

/lab/bin/mke2fs -q -F -t ext4 "$DISK"
mount -t ext4 "$DISK" /mnt
i=0
while [ "$i" -lt "$FILES" ]; do
    mkdir -p "/mnt/dir$((i % 5))"
    # From 1 byte to about 170 KB, most of them not a multiple of anything.
    dd if=/dev/urandom of="/mnt/dir$((i % 5))/file$i" bs=$((1 + i * i * 109)) count=1 \
        iflag=fullblock status=none
    i=$((i + 1))
done
(cd /mnt && find dir* -type f | sort | xargs sha256sum) >/tmp/sums
sync
verify "after writing"
umount /mnt

mount -t ext4 "$DISK" /mnt
verify "after a remount"
rm -r /mnt/dir1
grep -v dir1/ /tmp/sums >/tmp/kept
mv /tmp/kept /tmp/sums
sync
if [ "$(cat "/sys/block/${DISK##*/}/queue/discard_max_bytes")" -gt 0 ]; then
    fstrim /mnt
    echo "FACT filesystem_trimmed=1"
else
    echo "FACT filesystem_trimmed=0"
fi
verify "after a deletion"
umount /mnt

/lab/bin/e2fsck -fn "$DISK"
echo "FACT filesystem_files=$(wc -l </tmp/sums)"
echo "FACT filesystem_clean=1"
