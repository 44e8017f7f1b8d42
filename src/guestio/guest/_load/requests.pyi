from typing import Self

from typing_extensions import disjoint_base

from guestio.guest._load.iotlb_front import IotlbFront

@disjoint_base
class RequestMaker:
    def __new__(
        cls,
        block: int,
        blocks: int,
        iotlb: IotlbFront | None,
        strict: bool,
        stride: int,
        separate: bool,
        indirect: bool,
        verify: bool,
        seed: int,
    ) -> Self: ...
