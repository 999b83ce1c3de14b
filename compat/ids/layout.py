#!/usr/bin/env python3
"""Offsets of members in the kernel's structures.

Bindings that know the guest's types are asked for them (get_kernel_struct_offset). For other bindings, give a file with
--offsets: a JSON object of "struct member" to bytes. This script prints such a file on bindings that know:

    layout.py DOMAIN >offsets.json
"""

import argparse
import json
import sys

from libvmi import Libvmi, LibvmiError

NAMES = """
    cred euid|cred uid
    dentry d_fsdata|dentry d_name.name|dentry d_parent|dentry d_sb
    dma_buf name
    fdtable fd|fdtable max_fds|fdtable open_fds
    file f_inode|file f_op|file f_path.dentry|file f_path.mnt|file private_data
    files_struct fdt
    file_system_type name
    idr idr_rt
    inet_ehash_bucket chain
    inet_hashinfo ehash|inet_hashinfo ehash_mask|inet_hashinfo lhash2|inet_hashinfo lhash2_mask
    inet_listen_hashbucket nulls_head
    inode i_ino|inode i_mode|inode i_nlink|inode i_private|inode i_uid
    kobject entry|kobject name
    kset list
    latch_tree_node node|latch_tree_root tree
    mm_struct exe_file
    mod_tree_node mod|mod_tree_node node|mod_tree_root root
    module list|module name
    module_kobject kobj|module_kobject mod
    mount mnt|mount mnt_mountpoint|mount mnt_parent
    ns_common ops
    pid tasks
    pid_namespace idr
    proc_ns_operations name
    rb_node rb_left|rb_node rb_right
    signal_struct pids|signal_struct thread_head
    sock __sk_common.skc_daddr|sock __sk_common.skc_dport|sock __sk_common.skc_family|sock __sk_common.skc_nulls_node
    sock __sk_common.skc_num|sock __sk_common.skc_rcv_saddr|sock __sk_common.skc_state
    sock __sk_common.skc_v6_daddr|sock __sk_common.skc_v6_rcv_saddr|sock sk_protocol
    socket sk
    super_block s_type
    task_struct children|task_struct comm|task_struct cred|task_struct exit_state|task_struct files
    task_struct group_leader|task_struct mm
    task_struct pid|task_struct pid_links|task_struct real_parent|task_struct sibling|task_struct signal
    task_struct tasks|task_struct tgid|task_struct thread_node
    vfsmount mnt_root
    xa_node shift|xa_node slots
    xarray xa_head
"""
NAMES = [name.strip() for line in NAMES.splitlines() for name in line.split("|") if name.strip()]
"""All offsets that the programs in this folder need. A kernel may lack some: without modules, mod_tree_node."""


class Layout:
    """Offsets in bytes by "struct member"."""

    def __init__(self, vmi, path=None):
        self.vmi = vmi
        self.known = {}
        if path:
            with open(path) as file:
                self.known.update(json.load(file))

    def __getitem__(self, name):
        if name not in self.known:
            try:
                self.known[name] = self.vmi.get_kernel_struct_offset(*name.split(" "))
            except LibvmiError as error:
                raise LibvmiError(f"the offset of {name!r} is not known ({error}): give it with --offsets") from None
        return self.known[name]


def offset_of(vmi, name):
    """The offset, or None if the kernel or the bindings do not know it."""
    try:
        return vmi.get_kernel_struct_offset(*name.split(" "))
    except LibvmiError as error:
        if str(error) != "VMI_FAILURE":
            raise
        return None


def main():
    parser = argparse.ArgumentParser(description="Print the offsets that the programs of this folder need, as JSON.")
    parser.add_argument("domain", help="name of the guest")
    domain = parser.parse_args().domain
    try:
        with Libvmi(domain) as vmi:
            known = {name: offset for name in NAMES if (offset := offset_of(vmi, name)) is not None}
    except LibvmiError as error:
        print(f"{domain}: {error}", file=sys.stderr)
        return 2
    if not known:
        print(f"{domain}: these bindings do not know the types of the guest's kernel", file=sys.stderr)
        return 2
    print(json.dumps(known, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
