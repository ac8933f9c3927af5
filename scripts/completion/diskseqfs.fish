# SPDX-License-Identifier: MIT
# Completion of diskseqfs(8) in fish. It asks the kernel, and never starts the program.

function __diskseqfs_devices
    for file in /sys/class/block/*
        string replace -r '.*/' '' $file
    end
    for file in /sys/block/dm-*/dm/name
        cat $file
    end
end

function __diskseqfs_trees
    string match -rg '^\S+ (\S+) fuse\.diskseqfs ' </proc/mounts
end

complete -c diskseqfs -f
complete -c diskseqfs -n __fish_use_subcommand -a mount -d 'serve the tree'
complete -c diskseqfs -n __fish_use_subcommand -a unmount -d 'take the tree away'
complete -c diskseqfs -n __fish_use_subcommand -a list -d 'show disks and partitions with their sequence numbers'
complete -c diskseqfs -n __fish_use_subcommand -a resolve -d 'say which path in the tree a device has'
complete -c diskseqfs -n __fish_use_subcommand -a exec -d 'run a program with disks that stay what they are'
complete -c diskseqfs -n __fish_use_subcommand -a attach -d 'make a file a disk, for a time or while a program runs'
complete -c diskseqfs -n __fish_use_subcommand -a detach -d 'let the daemon hold a disk no longer'
complete -c diskseqfs -n __fish_use_subcommand -a leases -d 'show the disks that the daemon holds'
complete -c diskseqfs -n __fish_use_subcommand -a status -d 'show what the daemon has to do'
complete -c diskseqfs -n __fish_use_subcommand -a dm -d 'make and change device-mapper devices by what they are'
complete -c diskseqfs -n __fish_use_subcommand -a watch -d 'tell of disks that come and go'
complete -c diskseqfs -n __fish_use_subcommand -a wait -d 'wait for a disk'
complete -c diskseqfs -n __fish_use_subcommand -a doctor -d 'say what is wrong'
complete -c diskseqfs -n __fish_use_subcommand -a help -d 'display help for command'
complete -c diskseqfs -n __fish_use_subcommand -s V -l version -d 'output the version number'
complete -c diskseqfs -s h -l help -d 'display help for command'

complete -c diskseqfs -n '__fish_seen_subcommand_from mount' -a '(__fish_complete_directories)'
complete -c diskseqfs -n '__fish_seen_subcommand_from mount' -s f -l foreground -d 'stay in the foreground'
complete -c diskseqfs -n '__fish_seen_subcommand_from mount' -l replace -d 'take the tree over from the daemon that serves it'
complete -c diskseqfs -n '__fish_seen_subcommand_from mount' -s o -x -d 'mount options'
complete -c diskseqfs -n '__fish_seen_subcommand_from mount' -l linger -x -d 'ms a disk is held after the kernel let go of its name'
complete -c diskseqfs -n '__fish_seen_subcommand_from mount' -l hold -x -d 'seconds a disk is held at most for a program that cannot be seen'
complete -c diskseqfs -n '__fish_seen_subcommand_from mount' -l open-timeout -x -d 'seconds a program waits for a disk that does not answer'
complete -c diskseqfs -n '__fish_seen_subcommand_from mount' -l transport -x -a 'session fuse-native' -d 'what speaks with the kernel'
complete -c diskseqfs -n '__fish_seen_subcommand_from mount' -l log-level -x -a 'fatal error warn info debug trace silent' -d 'least important lines to log'
complete -c diskseqfs -n '__fish_seen_subcommand_from mount' -l log-format -x -a 'json pretty journal' -d 'format of log lines'

complete -c diskseqfs -n '__fish_seen_subcommand_from unmount' -a '(__diskseqfs_trees)'
complete -c diskseqfs -n '__fish_seen_subcommand_from resolve attach leases status doctor' -l json -d 'print JSON'
set -l columns NAME PATH KNAME MAJ:MIN DISKSEQ PARTN SIZE RO TYPE HOLDER DM-NAME DM-UUID BACK-FILE MOUNTPOINTS LEASES PINS
complete -c diskseqfs -n '__fish_seen_subcommand_from list' -s o -l output -x -a "$columns" -d columns
complete -c diskseqfs -n '__fish_seen_subcommand_from list' -s b -l bytes -d 'sizes in bytes'
complete -c diskseqfs -n '__fish_seen_subcommand_from list' -s n -l noheadings -d 'no headings'
complete -c diskseqfs -n '__fish_seen_subcommand_from list' -s r -l raw -d 'columns separated by one blank'
complete -c diskseqfs -n '__fish_seen_subcommand_from list' -s P -l pairs -d 'KEY="value" pairs'
complete -c diskseqfs -n '__fish_seen_subcommand_from list' -s J -l json -d 'print JSON'
complete -c diskseqfs -n '__fish_seen_subcommand_from list' -s p -l paths -d 'paths in the tree instead of names'
complete -c diskseqfs -n '__fish_seen_subcommand_from list' -s x -l sort -x -a "$columns" -d 'in the order of a column'
complete -c diskseqfs -n '__fish_seen_subcommand_from list resolve exec' -F -a '(__diskseqfs_devices)'

complete -c diskseqfs -n '__fish_seen_subcommand_from status' -l prometheus -d 'print metrics for Prometheus'
complete -c diskseqfs -n '__fish_seen_subcommand_from list exec attach detach leases status' -l tree -x -a '(__diskseqfs_trees)' -d 'where the tree is mounted'
complete -c diskseqfs -n '__fish_seen_subcommand_from exec attach' -l fd -d 'pass the open disk itself'
complete -c diskseqfs -n '__fish_seen_subcommand_from exec' -l write -d 'hold the disks open for writing'
complete -c diskseqfs -n '__fish_seen_subcommand_from exec' -l exclusive -d 'hold the disks exclusively'
complete -c diskseqfs -n '__fish_seen_subcommand_from attach' -F
complete -c diskseqfs -n '__fish_seen_subcommand_from attach' -l read-only -d 'nothing is written to the file'
complete -c diskseqfs -n '__fish_seen_subcommand_from attach' -l direct-io -d 'past the page cache'
complete -c diskseqfs -n '__fish_seen_subcommand_from attach' -l partscan -d 'look for a partition table'
complete -c diskseqfs -n '__fish_seen_subcommand_from attach' -l offset -x -d 'where the disk begins in the file'
complete -c diskseqfs -n '__fish_seen_subcommand_from attach' -l size -x -d 'how long it is'
complete -c diskseqfs -n '__fish_seen_subcommand_from attach' -l sector-size -x -a '512 1024 2048 4096' -d 'of the disk'
complete -c diskseqfs -n '__fish_seen_subcommand_from attach' -l share -d 'the same disk for all who share the same part of the file'
complete -c diskseqfs -n '__fish_seen_subcommand_from attach' -l grace -x -d 'seconds for which the daemon holds it'
complete -c diskseqfs -n '__fish_seen_subcommand_from attach' -l keep -d 'the daemon holds it until detach'
complete -c diskseqfs -n '__fish_seen_subcommand_from attach' -l reason -x -d 'what leases is to say of it'
complete -c diskseqfs -n '__fish_seen_subcommand_from detach' -a '(ls /dev/disk/by-diskseq 2>/dev/null)'

set -l calls create remove suspend resume reload rename message status table
complete -c diskseqfs -n "__fish_seen_subcommand_from dm; and not __fish_seen_subcommand_from $calls" -a "$calls"
complete -c diskseqfs -n '__fish_seen_subcommand_from dm; and __fish_seen_subcommand_from create' -l tree -x -a '(__diskseqfs_trees)' -d 'where the tree is mounted'
complete -c diskseqfs -n '__fish_seen_subcommand_from dm; and __fish_seen_subcommand_from create' -l fd -d 'pass the open disk itself'
complete -c diskseqfs -n '__fish_seen_subcommand_from dm; and __fish_seen_subcommand_from create' -l uuid -x -d 'its UUID'
complete -c diskseqfs -n '__fish_seen_subcommand_from dm; and __fish_seen_subcommand_from create reload' -l read-only -d 'nothing can be written to it'
complete -c diskseqfs -n '__fish_seen_subcommand_from dm; and __fish_seen_subcommand_from create' -l until-unused -d 'the kernel removes it with its last user'
complete -c diskseqfs -n '__fish_seen_subcommand_from dm; and __fish_seen_subcommand_from create' -l grace -x -d 'seconds for which the daemon holds it'
complete -c diskseqfs -n '__fish_seen_subcommand_from dm; and __fish_seen_subcommand_from create' -l keep -d 'the daemon holds it until detach'
complete -c diskseqfs -n '__fish_seen_subcommand_from dm; and __fish_seen_subcommand_from create' -l json -d 'print JSON'
complete -c diskseqfs -n '__fish_seen_subcommand_from dm; and __fish_seen_subcommand_from remove' -l deferred -d 'with its last user'
complete -c diskseqfs -n '__fish_seen_subcommand_from dm; and __fish_seen_subcommand_from suspend' -l no-flush -d 'do not wait for I/O that has begun'
complete -c diskseqfs -n '__fish_seen_subcommand_from dm; and __fish_seen_subcommand_from suspend' -l no-lockfs -d 'do not freeze the filesystem on it'
complete -c diskseqfs -n '__fish_seen_subcommand_from dm; and __fish_seen_subcommand_from table' -l inactive -d 'the one that is not in place'
complete -c diskseqfs -n '__fish_seen_subcommand_from dm; and __fish_seen_subcommand_from table' -l show-keys -d 'with the keys of encrypted devices'
complete -c diskseqfs -n '__fish_seen_subcommand_from dm; and __fish_seen_subcommand_from remove suspend resume reload rename message status table' -a '(__diskseqfs_devices)'

complete -c diskseqfs -n '__fish_seen_subcommand_from watch' -l json -d 'print JSON, one object a line'
complete -c diskseqfs -n '__fish_seen_subcommand_from watch' -l existing -d 'begin with those that are there'
complete -c diskseqfs -n '__fish_seen_subcommand_from wait' -l loop-file -r -F -d 'a loop device on that file'
complete -c diskseqfs -n '__fish_seen_subcommand_from wait' -l dm-name -x -d 'a device-mapper device of that name'
complete -c diskseqfs -n '__fish_seen_subcommand_from wait' -l gone -d 'wait until there is none'
complete -c diskseqfs -n '__fish_seen_subcommand_from wait' -l timeout -x -d 'seconds, at most'
