#!/bin/busybox sh
# The first process of a guest, in the initramfs: makes the disks visible, mounts the root, goes on with guest.sh there.
b=/bin/busybox
$b mkdir -p /proc /sys /dev /root
$b mount -t devtmpfs dev /dev
while read -r module; do $b insmod "/modules/$module" || echo "init: $module was refused"; done < /modules/order
$b mount -t ext4 -o rw,noatime /dev/vda /root || { echo "init: no root file system"; $b reboot -f; }
$b mount -t tmpfs -o mode=0755 tmpfs /root/run
$b cp /guest.sh /job.sh /root/run/
$b mount -o move /dev /root/dev
exec $b switch_root /root /run/guest.sh
