MOST_BYTES: int
RECORD_CONTENT_BYTES: int

def xxh64(data: bytes) -> int: ...
