"""``guestio blk`` with an IOTLB of thousands of entries that the front-end takes back at once."""

import subprocess
from collections.abc import Callable
from pathlib import Path

from guestio.vhost_user.messages import FrontendRequest, IotlbMessage, encode_iotlb
from tests.kit.serving import Driver

PAGE = 4096
PAGES = 5000


def test_thousands_of_updates_and_one_invalidation(
    serve: Callable[..., subprocess.Popen[str]], tmp_path: Path
):
    process = serve()
    with Driver(tmp_path / "s.sock", queues=0, iommu=True, map_all=False) as driver:
        channel = driver.frontend._exchange._channel
        user = driver.frontend.user_address(0)

        def apply(message: IotlbMessage) -> None:
            channel.send(encode_iotlb(FrontendRequest.IOTLB_MSG, message, need_reply=True))
            reply = channel.recv(10)
            assert reply is not None
            assert reply.payload == bytes(8)

        for page in range(PAGES):
            apply(IotlbMessage.update(page * 2 * PAGE, PAGE, user + page % 100 * PAGE, 3))
        apply(IotlbMessage.invalidate(0, PAGES * 2 * PAGE))
        apply(IotlbMessage.update(0, PAGE, user, 3))
    assert process.poll() is None
