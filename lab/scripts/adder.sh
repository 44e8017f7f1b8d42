# Drives the adder of examples/pci_device.py from user space.
set -e
cp /lab/files/adder_driver /tmp/adder_driver
chmod +x /tmp/adder_driver
for device in /sys/bus/pci/devices/*; do
    [ "$(cat "$device/vendor" "$device/device" | tr '\n' ' ')" = "0x1234 0xadd0 " ] && break
done
name=${device##*/}
echo "FACT name=$name"
for reset in $(seq "${RESETS:-0}"); do
    echo "FACT method=$(cat "$device/reset_method")"
    echo 1 >"$device/reset"
done
if [ "$MODE" = vfio ]; then
    # Interrupts are not remapped here, and the guest is the only one to suffer from it.
    echo 1 >/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts
    echo vfio-pci >"$device/driver_override"
    echo "$name" >/sys/bus/pci/drivers_probe
    /tmp/adder_driver vfio "$name" "/dev/vfio/$(basename "$(readlink "$device/iommu_group")")"
else
    echo 1 >"$device/enable"
    /tmp/adder_driver direct "$name"
fi
echo "FACT class=$(cat "$device/class")"
