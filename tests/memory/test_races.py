"""What must hold when threads, finalizers and signals meet at the worst moment, which is forced.

Each scenario runs in a process of its own: what it guards against kills the process.
"""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PRELUDE = """
import ctypes, fcntl, gc, os, select, struct, sys, termios, threading, time, weakref
from guestio import *
from guestio._core.iommu.address_space import AddressSpace
from guestio._core.memory.vector import RegionTable
from guestio._core.virtio.split import SplitRing
R, W, RW = Permissions.READ, Permissions.WRITE, Permissions.READ_WRITE
PAGE = 4096

def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.001)

def finish(thread):
    thread.join(30)
    assert not thread.is_alive(), "a thread hangs"

def collection(size, start=0):
    return GuestRegionCollection.from_regions([MmapRegion.memfd(start, size)])

def request(memory, length, flags=0, size=8):
    "A ring in the first pages with one request for memory at 0x100000."
    memory.write(0, struct.pack("<QIHH", 0x100000, length, flags, 0))
    memory.store(0x1002, 1, 2)
    return 0, 0x1000, 0x2000
"""

SCENARIOS = {
    "memory of before that goes while a ring looks for its own": """
        # Its finalizer has another thread take every translation away, and waits for that.
        iotlb, old = Iotlb(), collection(16 * PAGE)
        def translate():
            for page in range(16):
                iotlb.set_mapping(page * PAGE, (page ^ 1) * PAGE, PAGE, RW)
        translate()
        ring = SplitRing(AddressSpace(old._space.regions, iotlb._map), 512, 0, 0x3000, 0x5000)
        assert ring.pop() == ([], [])
        held, threads = [], []
        def goes(_):
            held.append(len(iotlb._map.leases))
            threads.append(threading.Thread(target=iotlb.invalidate_all))
            threads[0].start()
            wait_for(lambda: len(iotlb) == 0)
        watch = weakref.ref(old.find_region(0), goes)
        del old
        gc.collect()
        new = collection(16 * PAGE)
        ring.rebind(AddressSpace(new._space.regions, iotlb._map))
        ring.pop()
        assert held == [0], "an object went while a translation was being walked"
        finish(threads[0])
        translate()
        assert ring.pop() == ([], [])
    """,
    "memory of before that goes with what a ring looked at": """
        # The request that lacks a translation stays with the ring, and with it the old memory.
        iotlb, old = Iotlb(), collection(0x200000)
        for page in range(4):
            iotlb.set_mapping(page * PAGE, page * PAGE, PAGE, RW)
        ring = SplitRing(
            AddressSpace(old._space.regions, iotlb._map), 8, *request(old, 2 * PAGE)
        )
        iotlb.set_mapping(0x100000, 0x100000, PAGE, RW)
        chains, misses = ring.pop()
        assert not chains and misses
        held = []
        watch = weakref.ref(old.find_region(0), lambda _: held.append(len(iotlb._map.leases)))
        del old
        gc.collect()
        assert held == []
        new = collection(0x200000)
        request(new, 2 * PAGE)
        ring.rebind(AddressSpace(new._space.regions, iotlb._map))
        assert held == [0], "memory out of reach is still mapped"
        iotlb.set_mapping(0x101000, 0x103000, PAGE, RW)
        (chain,), misses = ring.pop()
        assert chain.readable.fragments() == [(0x100000, PAGE), (0x101000, PAGE)]
    """,
    "a request is settled while another thread copies its memory": """
        size = 64 << 20
        memory = collection(size + 0x100000)
        memory.fill(0x100000, size, 7)
        watch = weakref.ref(memory.find_region(0))
        ring = SplitRing(memory._space, 8, *request(memory, size))
        (chain,), _ = ring.pop()
        del memory, ring
        done, buffer = [], bytearray(size)
        begun = threading.Lock()
        begun.acquire()
        def copy():
            begun.release()
            chain.readable.readinto(buffer)
            done.append(True)
        # The running thread keeps the interpreter, so the main thread goes on only during the copy.
        sys.setswitchinterval(1000)
        thread = threading.Thread(target=copy)
        thread.start()
        begun.acquire()
        assert not done
        chain.finish(0)
        assert len(chain.readable) == 0 and chain.readable.fragments() == []
        assert chain.readable.slices() == [] and chain.readable.read() == b""
        gc.collect()
        finish(thread)
        assert done and buffer.count(7) == size
        # The ring is a user of the memory, and the request of the ring.
        assert chain.readable.fragments() == []
        del chain
        gc.collect()
        assert watch() is None, "the memory was kept for longer than the copy"
    """,
    "a vector is closed while another thread fills it": """
        size = 64 << 20
        memory = collection(size)
        vector = memory.gather(0, size, W)
        watch = weakref.ref(memory.find_region(0))
        del memory
        begun = threading.Lock()
        begun.acquire()
        def fill():
            begun.release()
            vector.fill(7)
        sys.setswitchinterval(1000)
        thread = threading.Thread(target=fill)
        thread.start()
        begun.acquire()
        assert watch() is not None
        vector.close()
        vector.close()
        gc.collect()
        assert watch() is not None and len(vector) == 0
        finish(thread)
        gc.collect()
        assert watch() is None and vector.fragments() == []
    """,
    "a revocation waits for a copy that outlives its request": """
        memory, iotlb = collection(0x200000), Iotlb()
        iotlb.set_mapping(0, 0, 0x200000, RW)
        space = AddressSpace(memory._space.regions, iotlb._map)
        ring = SplitRing(space, 8, *request(memory, 0x80000))
        (chain,), _ = ring.pop()
        reader, writer = os.pipe()
        moved = []
        thread = threading.Thread(target=lambda: moved.append(chain.readable.to_file(writer)))
        chain.hand_over()
        thread.start()
        def waiting():
            count = ctypes.c_int()
            fcntl.ioctl(reader, termios.FIONREAD, count)
            return count.value >= 65536
        wait_for(waiting)
        chain.finish(0)
        assert len(iotlb._map.leases) == 1
        revocation = threading.Thread(
            target=iotlb.invalidate_mapping, args=(0x100000, PAGE), daemon=True
        )
        revocation.start()
        wait_for(lambda: len(iotlb) == 2)
        revocation.join(0.05)
        assert revocation.is_alive(), "the memory is still being read"
        while thread.is_alive():
            if select.select([reader], [], [], 0.01)[0]:
                os.read(reader, 1 << 16)
        finish(revocation)
        assert len(iotlb._map.leases) == 0 and moved == [0x80000]
        try:
            chain.finish(0)
        except ValueError:
            pass
        else:
            raise AssertionError("settled twice")
    """,
}

WITH_A_SHIM = {
    "an empty page is read before its handler returns": """
        memory = collection(1 << 20)
        memory.fill(0, 1 << 20, 7)
        os.ftruncate(memory.find_region(0).backing.fd, 0)
        (reached, shim.to), (goes_on, go) = os.pipe(), os.pipe()
        variable("mmap_goes_on").value = goes_on
        variable("mmap_reached").value = shim.to
        outcome = []
        def first():
            try:
                memory.read(0x40000, 0x20000)
            except MemoryVanishedError as error:
                outcome.append(error)
        thread = threading.Thread(target=first)
        thread.start()
        # The page is there now, and its handler has not returned.
        assert os.read(reached, 1) == bytes(1)
        try:
            seen = memory.read(0x40000, 64)
        except MemoryVanishedError:
            seen = None
        finally:
            os.write(go, bytes(1))
            finish(thread)
        assert seen is None, "what is not the guest's was read as if it were"
        assert len(outcome) == 1 and memory.find_region(0).backing.vanished == 0x40000
    """,
    "data vanishes while a vector goes to a file": """
        memory = collection(0x10000)
        memory.fill(0, 0x10000, 7)
        out = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
        with memory.gather(0x7000, 0x3000, R) as vector:
            variable("shorten_to", ctypes.c_long).value = 0x9000
            variable("touch", ctypes.c_void_p).value = memory.host_address(0x9000)
            variable("shorten_fd").value = memory.find_region(0).backing.fd
            try:
                vector.to_file(out, 0)
            except MemoryVanishedError as error:
                assert error.addr == 0x9000
            else:
                raise AssertionError("what is not the guest's was written as if it were")
    """,
    "data vanishes while a disk writes it": """
        from guestio.virtio.blk import BlockDevice
        image = sys.argv[1]
        with open(image, "wb") as file:
            file.write(b"i" * 8192)
        device = BlockDevice(image)
        for kind, flags in ((1, 0), (0, 2)):
            memory = collection(0x10000)
            fd = memory.find_region(0).backing.fd
            memory.write(0x4000, struct.pack("<IIQ", kind, 0, 0))
            memory.write(0x4100, b"s")
            memory.fill(0x8000, 4096, 7)
            for i, (at, size, flag, after) in enumerate(
                ((0x4000, 16, 1, 1), (0x8000, 4096, 1 | flags, 2), (0x4100, 1, 2, 0))
            ):
                memory.write(16 * i, struct.pack("<QIHH", at, size, flag, after))
            memory.store(0x1002, 1, 2)
            ring = SplitRing(memory._space, 8, 0, 0x1000, 0x2000)
            variable("shorten_to", ctypes.c_long).value = 0x8000
            variable("touch", ctypes.c_void_p).value = memory.host_address(0x8000)
            variable("shorten_fd").value = fd
            chains, misses, served, _ = ring.run_once(device.server)
            assert served == 1 and not chains
            assert memory.read(0x4100, 1) == bytes([1]), "a lost request was seen to succeed"
            assert memory.read(0x2004, 8) == struct.pack("<II", 0, kind)
        assert device.errors == 2
        device.close()
    """,
    "a disk is closed while a thread is about to call the kernel": """
        # With io_threads=0 also a flush is done by the thread that walks the ring.
        from guestio.virtio.blk import BlockDevice
        for kind, threads in ((1, 0), (0, 0), (4, 0), (1, 1), (0, 1), (4, 1)):
            image, other = sys.argv[1], sys.argv[1] + ".other"
            for path in image, other:
                with open(path, "wb") as file:
                    file.write(path[-1:].encode() * 4096)
            device = BlockDevice(image, io_threads=threads)
            number = device._image.fd
            memory = collection(0x10000)
            memory.write(0x4000, struct.pack("<IIQ", kind, 0, 0))
            memory.fill(0x8000, 4096, 7)
            memory.write(0x4100, b"s")
            data = [(0x8000, 4096, 2 if kind == 0 else 0)] if kind < 4 else []
            for i, (at, size, flag) in enumerate([(0x4000, 16, 0), *data, (0x4100, 1, 2)]):
                more = 0 if at == 0x4100 else 1
                memory.write(16 * i, struct.pack("<QIHH", at, size, flag | more, i + 1))
            memory.store(0x1002, 1, 2)
            ring = SplitRing(memory._space, 8, 0, 0x1000, 0x2000)
            reached, go_on = os.pipe(), os.pipe()
            variable("file_goes_on").value = go_on[0]
            variable("file_reached").value = reached[1]
            answers = []
            def serve():
                chains, *_ = ring.run_once(device.server)
                answers.extend(device.process(0, chain) for chain in chains)
            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            assert os.read(reached[0], 1) == bytes(1)
            device.close()
            with open(other, "rb+", buffering=0) as file:
                assert file.fileno() != number, "the call that comes now meets another file"
                os.write(go_on[1], bytes(1))
                finish(thread)
                for answer in answers:
                    if not isinstance(answer, int):
                        answer.result(30)
                wait_for(lambda: device._image.fd < 0)
                assert os.pread(file.fileno(), 4096, 0) == b"r" * 4096
            assert memory.read(0x4100, 1) == bytes(1)
            assert memory.read(0x8000, 1) == (b"e" if kind == 0 else bytes([7]))
            if kind == 1:
                assert open(image, "rb").read() == bytes([7]) * 4096
            for fd in (*reached, *go_on):
                os.close(fd)
            # The thread that used the image last closes it.
            wait_for(lambda: not os.path.exists(f"/proc/self/fd/{number}"))
    """,
}


def run(code, *arguments, preload=None):
    environment = dict(os.environ)
    if preload is not None:
        environment["LD_PRELOAD"] = str(preload)
        code = (
            "shim = ctypes.CDLL(None)\n"
            "def variable(name, kind=ctypes.c_int):\n"
            "    return kind.in_dll(shim, name)\n" + textwrap.dedent(code)
        )
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code) + "\nprint('survived')", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_threads_and_finalizers(scenario):
    done = run(SCENARIOS[scenario])
    assert (done.returncode, done.stdout) == (0, "survived\n"), done.stderr[-3000:]


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    if "ASAN_OPTIONS" in os.environ or "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("a sanitizer's runtime must be the first that is loaded")
    compiler = os.environ.get("CC", "cc").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip("there is no C compiler")
    made = tmp_path_factory.mktemp("orders") / "orders.so"
    source = Path(__file__).with_name("orders.c")
    subprocess.run([*compiler, "-shared", "-fPIC", "-O1", "-o", made, source], check=True)
    return made


@pytest.mark.parametrize("scenario", WITH_A_SHIM)
def test_signals_and_system_calls(scenario, shim, tmp_path):
    done = run(WITH_A_SHIM[scenario], str(tmp_path / "image"), preload=shim)
    assert (done.returncode, done.stdout) == (0, "survived\n"), done.stderr[-3000:]
