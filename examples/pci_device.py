"""A PCI device with registers, DMA and an interrupt, for QEMU 10.1 or newer."""

import sys

from guestio.pci import Bar, PciDevice, PciHost
from guestio.vfio_user import Server

ADDRESS, COUNT, START, SUM = 0x00, 0x08, 0x0C, 0x10


class Adder(PciDevice):
    """Adds COUNT 32-bit numbers at ADDRESS when START is written, into SUM, and interrupts."""

    vendor_id, device_id, class_code = 0x1234, 0xADD0, 0x120000
    bars = {0: Bar(4096)}
    interrupts = 1

    def attached(self, host: PciHost) -> None:
        self.host = host
        self.reset()

    def reset(self) -> None:
        self.registers = dict.fromkeys(range(0, 4096, 4), 0)

    def read(self, bar: int, offset: int, size: int) -> int:
        return self.registers[offset]

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        self.registers[offset] = value
        if offset == START:
            address = self.registers[ADDRESS] | self.registers[ADDRESS + 4] << 32
            numbers = self.host.memory.read(address, 4 * self.registers[COUNT])
            self.registers[SUM] = sum(memoryview(numbers).cast("I")) % 2**32
            self.host.interrupt()


# qemu ... -device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/tmp/adder.sock"}}'
if __name__ == "__main__":
    Server(Adder(), sys.argv[1] if len(sys.argv) > 1 else "/tmp/adder.sock").serve()
