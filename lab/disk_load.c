/* Random direct requests of several processes, each of which verifies what it reads.

       disk_load DEVICE PROCESSES REQUESTS BLOCKS

   Process i has BLOCKS blocks of 4 KiB from i * BLOCKS on. It writes blocks that say where they
   are and how often they were written, reads them again in another order, and compares. REQUESTS
   are those of each process. Prints FACT load_requests=N, and ends with 1 if anything is wrong. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BLOCK = 4096, WORDS = BLOCK / 8 };

static void fill(uint64_t *block, uint64_t place, uint64_t version)
{
    uint64_t state = place * 0x9E3779B97F4A7C15u + version;
    for (int i = 0; i < WORDS; i++) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        block[i] = state;
    }
    block[0] = place, block[1] = version;
}

static int work(const char *path, unsigned process, unsigned long requests, unsigned long blocks)
{
    uint32_t *version = calloc(blocks, sizeof(*version));
    uint64_t *block, expected[WORDS];
    int fd = open(path, O_RDWR | O_DIRECT);
    if (fd < 0 || !version || posix_memalign((void **)&block, BLOCK, BLOCK))
        return perror(path), 1;
    srandom(process + 1);
    for (unsigned long n = 0; n < requests; n++) {
        unsigned long at = (unsigned long)random() % blocks, place = process * blocks + at;
        off_t offset = (off_t)place * BLOCK;
        if (!version[at] || random() & 1) {
            fill(block, place, ++version[at]);
            if (pwrite(fd, block, BLOCK, offset) != BLOCK)
                return fprintf(stderr, "write of block %lu: %s\n", place, strerror(errno)), 1;
        } else {
            memset(block, 0xA5, BLOCK);
            if (pread(fd, block, BLOCK, offset) != BLOCK)
                return fprintf(stderr, "read of block %lu: %s\n", place, strerror(errno)), 1;
            fill(expected, place, version[at]);
            if (memcmp(block, expected, BLOCK))
                return fprintf(stderr, "block %lu, version %u: read %lu, version %lu\n", place,
                               version[at], block[0], block[1]), 1;
        }
    }
    return close(fd) ? 1 : 0;
}

int main(int argc, char **argv)
{
    if (argc != 5)
        return fputs("disk_load DEVICE PROCESSES REQUESTS BLOCKS\n", stderr), 2;
    unsigned processes = atoi(argv[2]);
    unsigned long requests = strtoul(argv[3], NULL, 0), blocks = strtoul(argv[4], NULL, 0);
    int status, wrong = 0;
    for (unsigned i = 0; i < processes; i++)
        if (!fork())
            _exit(work(argv[1], i, requests, blocks));
    while (wait(&status) > 0)
        wrong |= status;
    if (!wrong)
        printf("FACT load_requests=%lu\n", processes * requests);
    return !!wrong;
}
