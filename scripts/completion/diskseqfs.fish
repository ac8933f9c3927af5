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
complete -c diskseqfs -n '__fish_seen_subcommand_from list resolve' -l json -d 'print JSON'
complete -c diskseqfs -n '__fish_seen_subcommand_from resolve' -F -a '(__diskseqfs_devices)'
