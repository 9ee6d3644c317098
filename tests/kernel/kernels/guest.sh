#!/bin/bash
# Process 1 of a guest once its root is there: mounts what a machine with systemd has, runs the job, answers through the last disk, ends.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TERM=dumb
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf -o mode=0700 bpf /sys/fs/bpf
mkdir -p /dev/pts /dev/shm /run/netns /run/lock /run/results /run/tmp   # not on /tmp: the tree under test may be below it
mount -t tmpfs tmpfs /run/tmp
export TMPDIR=/run/tmp
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
ln -sfn /proc/self/fd /dev/fd
mount -t ext4 -o ro /dev/vdb /usr/lib/modules
ip link set lo up
hostname guest
export RESULTS=/run/results
{ uname -r; grep -c ^processor /proc/cpuinfo; } > $RESULTS/machine
bash /run/job.sh
dmesg > $RESULTS/dmesg
tar -cf /dev/vdd -C $RESULTS .
sync
echo b > /proc/sysrq-trigger   # with -no-reboot that ends QEMU; power off would need ACPI
sleep 60   # process 1 must not end before that has happened
