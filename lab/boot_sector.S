/* A boot sector: the firmware reads it from a disk and runs it at 0x7c00. It has the firmware read
   a text of two sectors from block 1000 of the same disk, says it on the serial port, has the
   firmware write it to block 2000, and ends QEMU by its isa-debug-exit: status 3, or 5 if the
   firmware refused. */
        .code16
        .globl _start
_start: xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %ss
        movw    $0x7c00, %sp
        movb    %dl, drive
        movb    $0x42, %ah              /* extended read */
        call    disk
        movw    $0x8000, %si
next:   lodsb
        testb   %al, %al
        jz      write
        movb    %al, %bl
wait:   movw    $0x3fd, %dx             /* until there is room for a byte */
        inb     %dx, %al
        testb   $0x20, %al
        jz      wait
        movb    %bl, %al
        movw    $0x3f8, %dx
        outb    %al, %dx
        jmp     next
write:  movw    $2000, block
        movw    $0x4300, %ax            /* extended write */
        call    disk
        movb    $1, %al
        jmp     end
disk:   movw    $packet, %si
        movb    drive, %dl
        int     $0x13
        jc      failed
        ret
failed: movb    $2, %al
end:    movw    $0xf4, %dx
        outb    %al, %dx
        hlt

drive:  .byte   0
        .balign 4
packet: .byte   16, 0
        .word   2                       /* sectors */
        .word   0x8000, 0               /* to offset, segment */
block:  .long   1000, 0
        .org    510
        .word   0xaa55
