"""What the tests of the virtio-iommu share: requests by name, and a recording target."""

from guestio.virtio.iommu import Pending, Status, wire

OK, INVAL, RANGE, NOENT = Status.OK, Status.INVAL, Status.RANGE, Status.NOENT
UNSUPP, DEVERR, NOMEM, FAULT = Status.UNSUPP, Status.DEVERR, Status.NOMEM, Status.FAULT
R, W, RW, MMIO = 1, 2, 3, 4
MSI = (0xFEE00000, 0xFEEFFFFF, 1)
PAGE = 0x1000


def attach(endpoint, domain, flags=0, reserved=bytes(4)):
    return wire.pack(wire.Attach(domain, endpoint, flags, reserved))


def detach(endpoint, domain):
    return wire.pack(wire.Detach(domain, endpoint))


def map_(domain, start, end, phys, flags=RW):
    return wire.pack(wire.Map(domain, start, end, phys, flags))


def unmap(domain, start, end, reserved=bytes(4)):
    return wire.pack(wire.Unmap(domain, start, end, reserved))


def probe(endpoint):
    return wire.pack(wire.Probe(endpoint))


def status(answer):
    """The status of an answer that is there, or None for a zero-length one."""
    assert isinstance(answer, bytes), answer
    if not answer:
        return None
    assert answer[-3:] == bytes(3)
    return Status(answer[-4])


def send(iommu, request, writable=4):
    """Send a request that must not wait; its status."""
    return status(iommu.handle_request(request, writable))


def send_all(iommu, *requests):
    for request in requests:
        assert send(iommu, request) is OK


def pend(iommu, request):
    """Send a request that must wait."""
    answer = iommu.handle_request(request, 4)
    assert isinstance(answer, Pending)
    assert not answer.done
    return answer


class LedgerTarget:
    """A DMA target that keeps to the contract, and fails where it is told to.

    Attributes:
        held: What is mapped, by first address.
        calls: Every call, in order.
        failures: Numbers of the calls (from 0) that fail, and with what.
    """

    def __init__(self):
        self.held = {}
        self.calls = []
        self.failures = {}

    def fail_next(self, error, after=0):
        self.failures[len(self.calls) + after] = error

    def _begin(self, call):
        self.calls.append(call)
        error = self.failures.pop(len(self.calls) - 1, None)
        if error is not None:
            raise error

    def map_dma(self, request):
        self._begin(("map", request.start, request.size))
        for held in self.held.values():
            assert request.end <= held.start or held.end <= request.start, "mapped twice"
        self.held[request.start] = request

    def unmap_dma(self, start, size):
        self._begin(("unmap", start, size))
        assert self.held[start].size == size, "not what was mapped"
        del self.held[start]

    def ranges(self):
        return sorted((r.start, r.size) for r in self.held.values())
