# Writes known bytes to a disk with direct I/O, flushes, and reads them back from the device.
#   DISK            block device (/dev/vda)
#   PATTERN_FILE    the bytes; a multiple of 512 of them (/lab/pattern)
#   PATTERN_OFFSET  where on the disk, in bytes, a multiple of 512 (0)
#   PATTERN_BLOCK   bytes per request (65536)
: "${DISK:=/dev/vda}" "${PATTERN_FILE:=/lab/pattern}" "${PATTERN_OFFSET:=0}"
: "${PATTERN_BLOCK:=65536}"
set -eu
length=$(stat -c %s "$PATTERN_FILE")
dd if="$PATTERN_FILE" of="$DISK" bs="$PATTERN_BLOCK" seek="$PATTERN_OFFSET" \
    oflag=direct,seek_bytes conv=notrunc,fsync status=none
dd if="$DISK" bs="$PATTERN_BLOCK" skip="$PATTERN_OFFSET" count="$length" \
    iflag=direct,skip_bytes,count_bytes status=none >/tmp/pattern.read
cmp "$PATTERN_FILE" /tmp/pattern.read
rm /tmp/pattern.read
echo "FACT pattern_written=$length"
