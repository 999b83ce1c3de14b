"""Command line of the lab VM: ``python -m ci.vm``."""

import argparse
import sys

from ci.vm import image, lab


def main() -> int:
    """Run one command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ci.vm",
        description="Build and boot the lab VM.",
        epilog="examples:\n"
        "  python -m ci.vm kernels\n"
        "  python -m ci.vm image --kernel 6.12\n"
        "  python -m ci.vm boot --shell\n"
        "  python -m ci.vm two\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("kernels", help="list the kernels of ci/kernels.toml")
    build = commands.add_parser("image", help="build an image, or find it in the cache")
    build.add_argument("--rebuild", action="store_true", help="fetch the packages again and build anew")
    boot = commands.add_parser("boot", help="boot the VM and keep it until Ctrl-C")
    boot.add_argument("--shell", action="store_true", help="a root shell on the serial console, on this terminal")
    boot.add_argument("--memory", type=int, default=1024, metavar="MIB", help="memory of the guest (default 1024)")
    boot.add_argument("--cpus", type=int, default=1, help="virtual CPUs (default 1)")
    boot.add_argument("--nokaslr", action="store_true", help="load the kernel at its linked address")
    boot.add_argument("--append", default="", help="more words for the kernel's command line")
    two = commands.add_parser("two", help="the IDS in one VM, the monitored system in another, a hostile host between")
    for command in (build, boot, two):
        command.add_argument(
            "--kernel",
            choices=list(image.kernels()),
            default=image.default_kernel(),
            help=f"which kernel (default {image.default_kernel()})",
        )
    options = parser.parse_args()
    try:
        if options.command == "kernels":
            for kernel in image.kernels().values():
                mark = " (default)" if kernel.name == image.default_kernel() else ""
                print(f"{kernel.name:8}{kernel.package}{mark}")
        elif options.command == "image":
            print(image.image(options.kernel, rebuild=options.rebuild).folder)
        elif options.command == "two":
            from ci.vm.two import show  # with all of vmishim, which an image can be built without

            return show(options.kernel)
        else:
            lab.keep(
                kernel=options.kernel,
                memory_mib=options.memory,
                cpus=options.cpus,
                nokaslr=options.nokaslr,
                append=options.append,
                shell=options.shell,
            )
    except (image.ImageError, lab.LabError) as error:
        print(f"ci.vm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
