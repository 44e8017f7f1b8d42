/* XXH64 (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md), in pieces. */
#ifndef GUESTIO_XXH64
#define GUESTIO_XXH64

#include <stdint.h>
#include <string.h>

typedef struct Xxh64 {
    uint64_t lane[4];
    uint64_t total;
} Xxh64;

static const uint64_t XXH_1 = 0x9E3779B185EBCA87u, XXH_2 = 0xC2B2AE3D27D4EB4Fu,
                      XXH_3 = 0x165667B19E3779F9u, XXH_4 = 0x85EBCA77C2B2AE63u,
                      XXH_5 = 0x27D4EB2F165667C5u;

static inline uint64_t xxh64_rotate(uint64_t x, int by) { return x << by | x >> (64 - by); }

static inline uint64_t xxh64_u64(const uint8_t *at)
{
    uint64_t x;
    memcpy(&x, at, 8);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    x = __builtin_bswap64(x);
#endif
    return x;
}

static inline uint64_t xxh64_u32(const uint8_t *at)
{
    uint32_t x;
    memcpy(&x, at, 4);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    x = __builtin_bswap32(x);
#endif
    return x;
}

static inline uint64_t xxh64_round(uint64_t lane, uint64_t input)
{
    return xxh64_rotate(lane + input * XXH_2, 31) * XXH_1;
}

static void xxh64_begin(Xxh64 *hash)
{
    hash->lane[0] = XXH_1 + XXH_2;
    hash->lane[1] = XXH_2;
    hash->lane[2] = 0;
    hash->lane[3] = -XXH_1;
    hash->total = 0;
}

/* All parts but the last one have a multiple of 32 bytes. */
static void xxh64_add(Xxh64 *hash, const uint8_t *data, uint64_t count)
{
    hash->total += count;
    for (; count >= 32; data += 32, count -= 32)
        for (int i = 0; i < 4; i++)
            hash->lane[i] = xxh64_round(hash->lane[i], xxh64_u64(data + 8 * i));
}

/* `rest` is what the last part had behind its last whole 32 bytes. */
static uint64_t xxh64_end(const Xxh64 *hash, const uint8_t *rest)
{
    const uint64_t *lane = hash->lane;
    uint64_t left = hash->total % 32, sum = XXH_5;
    if (hash->total >= 32) {
        sum = xxh64_rotate(lane[0], 1) + xxh64_rotate(lane[1], 7) + xxh64_rotate(lane[2], 12)
            + xxh64_rotate(lane[3], 18);
        for (int i = 0; i < 4; i++)
            sum = (sum ^ xxh64_round(0, lane[i])) * XXH_1 + XXH_4;
    }
    sum += hash->total;
    for (; left >= 8; rest += 8, left -= 8)
        sum = xxh64_rotate(sum ^ xxh64_round(0, xxh64_u64(rest)), 27) * XXH_1 + XXH_4;
    if (left >= 4) {
        sum = xxh64_rotate(sum ^ xxh64_u32(rest) * XXH_1, 23) * XXH_2 + XXH_3;
        rest += 4;
        left -= 4;
    }
    for (; left; rest++, left--)
        sum = xxh64_rotate(sum ^ *rest * XXH_5, 11) * XXH_1;
    sum = (sum ^ sum >> 33) * XXH_2;
    sum = (sum ^ sum >> 29) * XXH_3;
    return sum ^ sum >> 32;
}

#endif
