/* Drives a virtio PCI device that no driver is bound to: its first queue lies where the IOMMU maps
   nothing.

       nowhere /sys/devices/.../0000:00:03.0

   Registers are those of virtio 1.4, section 4.1.4, found by the vendor capabilities. */

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { COMMON = 1, NOTIFY = 2, NOWHERE = 0x10000000 };

static int open_in(const char *device, const char *name, int flags)
{
    char path[4096];
    snprintf(path, sizeof(path), "%s/%s", device, name);
    int fd = open(path, flags);
    if (fd < 0)
        perror(path), exit(1);
    return fd;
}

int main(int argc, char **argv)
{
    uint8_t config[256], at;
    volatile uint8_t *found[3] = {0};
    uint32_t multiplier = 0;
    if (argc != 2)
        return fputs("nowhere DEVICE\n", stderr), 2;
    int fd = open_in(argv[1], "enable", O_WRONLY);
    if (write(fd, "1", 1) != 1)
        return perror("enable"), 1;
    fd = open_in(argv[1], "config", O_RDWR);
    if (pread(fd, config, sizeof(config), 0) != sizeof(config))
        return perror("config"), 1;
    uint16_t command = config[4] | config[5] << 8 | 6; /* memory space, bus master */
    if (pwrite(fd, &command, 2, 4) != 2)
        return perror("command"), 1;
    for (at = config[0x34]; at; at = config[at + 1]) {
        uint8_t *cap = config + at, kind = cap[3];
        uint32_t offset, length;
        char name[16];
        if (cap[0] != 9 || (kind != COMMON && kind != NOTIFY) || found[kind])
            continue;
        memcpy(&offset, cap + 8, 4), memcpy(&length, cap + 12, 4);
        if (kind == NOTIFY)
            memcpy(&multiplier, cap + 16, 4);
        snprintf(name, sizeof(name), "resource%u", cap[4]);
        int bar = open_in(argv[1], name, O_RDWR);
        void *mapped = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, bar, offset & ~4095u);
        if (mapped == MAP_FAILED)
            return perror(name), 1;
        found[kind] = (volatile uint8_t *)mapped + (offset & 4095);
    }
    volatile uint8_t *common = found[COMMON];
    if (!common || !found[NOTIFY])
        return fputs("the device is no modern virtio device\n", stderr), 1;
#define REGISTER(type, offset) (*(volatile type *)(common + (offset)))
    REGISTER(uint8_t, 20) = 0;
    while (REGISTER(uint8_t, 20))
        usleep(1000);
    REGISTER(uint8_t, 20) = 1 | 2;
    REGISTER(uint32_t, 8) = 1; /* VERSION_1 and ACCESS_PLATFORM, the upper word */
    REGISTER(uint32_t, 12) = 1 | 2;
    REGISTER(uint32_t, 8) = 0;
    REGISTER(uint32_t, 12) = 0;
    REGISTER(uint8_t, 20) = 1 | 2 | 8;
    if (!(REGISTER(uint8_t, 20) & 8))
        return fputs("the device refuses the features\n", stderr), 1;
    REGISTER(uint16_t, 22) = 0;
    REGISTER(uint16_t, 24) = 8;
    for (int part = 0; part < 3; part++) {
        REGISTER(uint32_t, 32 + 8 * part) = NOWHERE + 0x1000 * part;
        REGISTER(uint32_t, 36 + 8 * part) = 0;
    }
    uint16_t place = REGISTER(uint16_t, 30);
    REGISTER(uint16_t, 28) = 1;
    REGISTER(uint8_t, 20) = 1 | 2 | 8 | 4;
    *(volatile uint16_t *)(found[NOTIFY] + place * multiplier) = 0;
    sleep(2);
    REGISTER(uint8_t, 20) = 0;
    while (REGISTER(uint8_t, 20))
        usleep(1000);
    puts("FACT nowhere=1");
    return 0;
}
