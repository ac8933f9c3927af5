# SPDX-License-Identifier: MIT
# Completion of diskseqfs(8) in bash. It asks the kernel, and never starts the program.

_diskseqfs_devices() {
	# Paths, then names: from sysfs, and of device-mapper.
	compgen -f -- "$1"
	local name names=()
	for name in /sys/class/block/*; do names+=("${name##*/}"); done
	for name in /sys/block/dm-*/dm/name; do [ -r "$name" ] && names+=("$(<"$name")"); done
	compgen -W "${names[*]}" -- "$1"
}

# Where a tree is.
_diskseqfs_trees() {
	compgen -W "$(awk '$3 == "fuse.diskseqfs" { print $2 }' /proc/mounts)" -- "$1"
}

_diskseqfs() {
	local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} command=${COMP_WORDS[1]}
	COMPREPLY=()
	if [ "$COMP_CWORD" -eq 1 ]; then
		mapfile -t COMPREPLY < <(compgen -W 'mount unmount list resolve exec attach detach leases status dm watch wait doctor help --help --version' -- "$word")
		return
	fi
	if [ "$command" = dm ]; then
		if [ "$COMP_CWORD" -eq 2 ]; then
			mapfile -t COMPREPLY < <(compgen -W 'create remove suspend resume reload rename message status table help --help' -- "$word")
			return
		fi
		command="dm ${COMP_WORDS[2]}"
	fi
	# What comes after "--" is another program's.
	local i
	for ((i = 2; i < COMP_CWORD; i++)); do
		[ "${COMP_WORDS[i]}" = -- ] || continue
		mapfile -t COMPREPLY < <(compgen -c -f -- "$word")
		return
	done
	local words=
	case $command:$before in
	mount:--transport) words='session fuse-native' ;;
	mount:--log-level) words='fatal error warn info debug trace silent' ;;
	mount:--log-format) words='pretty json journal' ;;
	mount:-o) words='linger= hold= open_timeout= transport= log_level= log_format= ro noatime relatime' ;;
	mount:--linger | mount:--hold | mount:--open-timeout) return ;;
	exec:--tree | attach:--tree | detach:--tree | leases:--tree | status:--tree | list:--tree | 'dm create:--tree')
		mapfile -t COMPREPLY < <(_diskseqfs_trees "$word")
		return
		;;
	attach:--offset | attach:--size | attach:--grace | attach:--reason | wait:--timeout | 'dm create:--uuid' | 'dm create:--grace') return ;;
	wait:--loop-file)
		mapfile -t COMPREPLY < <(compgen -f -- "$word")
		return
		;;
	wait:--dm-name) words=$(cat /sys/block/dm-*/dm/name 2>/dev/null) ;;
	attach:--sector-size) words='512 1024 2048 4096' ;;
	list:-o | list:--output | list:-x | list:--sort)
		words='NAME PATH KNAME MAJ:MIN DISKSEQ PARTN SIZE RO TYPE HOLDER DM-NAME DM-UUID BACK-FILE MOUNTPOINTS LEASES PINS'
		;;
	help:*) words='mount unmount list resolve exec attach detach leases status dm watch wait doctor' ;;
	*)
		case $word in
		-*)
			case $command in
			mount) words='--foreground --replace -o --linger --hold --open-timeout --transport --log-level --log-format --help' ;;
			unmount) words='--help' ;;
			list) words='--output --bytes --noheadings --raw --pairs --json --paths --sort --tree --help' ;;
			resolve | doctor) words='--json --help' ;;
			watch) words='--json --existing --help' ;;
			wait) words='--loop-file --dm-name --gone --timeout --help' ;;
			exec) words='--tree --fd --write --exclusive --help' ;;
			attach)
				words='--tree --fd --read-only --direct-io --partscan --offset --size --sector-size'
				words+=' --share --grace --keep --reason --json --help'
				;;
			detach) words='--tree --help' ;;
			leases) words='--tree --json --help' ;;
			status) words='--tree --json --prometheus --help' ;;
			'dm create') words='--tree --fd --uuid --read-only --until-unused --grace --keep --json --help' ;;
			'dm remove') words='--deferred --help' ;;
			'dm suspend') words='--no-flush --no-lockfs --help' ;;
			'dm reload') words='--read-only --help' ;;
			'dm table') words='--inactive --show-keys --help' ;;
			dm\ *) words='--help' ;;
			esac
			;;
		*)
			case $command in
			mount) mapfile -t COMPREPLY < <(compgen -d -- "$word") ;;
			unmount) mapfile -t COMPREPLY < <(_diskseqfs_trees "$word") ;;
			wait | detach) mapfile -t COMPREPLY < <(compgen -W "$(ls /dev/disk/by-diskseq 2>/dev/null)" -- "$word") ;;
			attach) mapfile -t COMPREPLY < <(compgen -f -- "$word") ;;
			'dm create') ;;
			list | resolve | exec | dm\ *) mapfile -t COMPREPLY < <(_diskseqfs_devices "$word") ;;
			esac
			return
			;;
		esac
		;;
	esac
	mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
}
complete -o filenames -F _diskseqfs diskseqfs
