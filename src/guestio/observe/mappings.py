"""Lifetimes of translations, from the events that make and end them."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pyarrow as pa

from guestio._core.iommu.intervals import IntervalMap
from guestio.addr import Permissions
from guestio.budgets import RECORD_OPEN_MAPPINGS
from guestio.observe.schema import MAPPING_COLUMNS
from guestio.trace import Records, What

_MAKES: Final = (What.UPDATE, What.DMA_MAP)
_ENDS: Final = (What.INVALIDATE, What.EVICTED, What.DMA_UNMAP)
_KINDS: Final = np.array([*_MAKES, *_ENDS, What.DISCONNECTED], np.uint16)
_SCHEMA: Final = pa.schema([pa.field(each.name, each.type) for each in MAPPING_COLUMNS])
_ALL: Final = 1 << 64

_Row = tuple[Any, ...]


class Mappings:
    """Follows mappings of servers from their beginning to their end."""

    def __init__(self) -> None:
        self._maps: dict[int, IntervalMap] = {}
        # By origin and address: length, target, access, since.
        self._since: dict[tuple[int, int], _Row] = {}

    def add(self, records: Records, *, last: bool) -> pa.Table:
        """Take events in the order of time; the mappings that ended, as a table.

        Args:
            records: The next ones; only some kinds matter.
            last: Whether no more come: mappings that are there are given as well.
        """
        ended: list[_Row] = []
        for each in records[np.isin(records["what"], _KINDS)].tolist():
            time, _, address, length, target, _, _, _, what, origin, _, access = each
            known = self._maps.get(origin)
            if known is None:
                known = self._maps[origin] = IntervalMap(merge=False)
            if what == What.DISCONNECTED:
                address, length = 0, _ALL
            elif not 0 < length <= _ALL - address:
                continue
            for start, size, _, _ in known.overlapping(address, length) if len(known) else ():
                known.cut(start, size)
                row = self._since.pop((origin, start))
                ended.append((origin, start, *row, time, what))
            if what in _MAKES and len(self._since) < RECORD_OPEN_MAPPINGS:
                known.overwrite(address, length, address, Permissions.READ)
                self._since[origin, address] = (length, target, access, time)
        if last:
            ended += [(*place, *row, None, None) for place, row in self._since.items()]
            self._since.clear()
            self._maps.clear()
        columns = zip(*ended, strict=True) if ended else ((),) * len(_SCHEMA)
        return pa.table(
            [pa.array(each, field.type) for each, field in zip(columns, _SCHEMA, strict=True)],
            schema=_SCHEMA,
        )
