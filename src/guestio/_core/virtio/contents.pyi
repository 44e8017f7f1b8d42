MOST_BYTES: int
RECORD_CONTENT_BYTES: int

def xxh64(data: bytes) -> int:
    """The XXH64 of bytes, with seed 0."""
