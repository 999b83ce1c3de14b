"""Command line of the lab VM: ``python -m lab``."""

import argparse
import signal
import sys

from lab import enrolled, launch, vm
from lab.image import image
from lab.kernels import default_kernel, kernels
from lab.steps import ImageError
from vmishim.commands import CommandError
from vmishim.errors import LibvmiError


def main() -> int:
    """Run one command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lab",
        description="Build and boot the lab VM.",
        epilog="examples:\n"
        "  python -m lab kernels\n"
        "  python -m lab image --kernel 6.12\n"
        "  python -m lab boot --agent lab     a VM to play with: `vmishim ps lab`\n"
        "  python -m lab boot --shell\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("kernels", help="list the kernels of ci/kernels.toml")
    build = commands.add_parser("image", help="build an image, or find it in the cache")
    build.add_argument("--rebuild", action="store_true", help="fetch the packages again and rebuild")
    boot = commands.add_parser("boot", help="boot the VM and keep it until Ctrl-C")
    boot.add_argument("--shell", action="store_true", help="a root shell on the serial console, on this terminal")
    boot.add_argument(
        "--agent", metavar="NAME", help="install an agent, and enrol the VM under this name until it ends"
    )
    boot.add_argument("--memory", type=int, default=1024, metavar="MIB", help="memory of the guest (default 1024)")
    boot.add_argument("--cpus", type=int, default=1, help="virtual CPUs (default 1)")
    boot.add_argument("--nokaslr", action="store_true", help="load the kernel at its linked address")
    boot.add_argument("--append", default="", help="more words for the kernel's command line")
    for command in (build, boot):
        command.add_argument(
            "--kernel",
            choices=list(kernels()),
            default=default_kernel(),
            help=f"which kernel (default {default_kernel()})",
        )
    options = parser.parse_args()
    # Ended by another program, too, it takes back what it enrolled.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if options.command == "kernels":
            for kernel in kernels().values():
                mark = " (default)" if kernel.name == default_kernel() else ""
                print(f"{kernel.name:8}{kernel.package}{mark}")
        elif options.command == "image":
            print(image(options.kernel, rebuild=options.rebuild).folder)
        else:
            name = options.agent
            if name:
                enrolled.check(name)
            vm.keep(
                kernel=options.kernel,
                memory_mib=options.memory,
                cpus=options.cpus,
                nokaslr=options.nokaslr,
                append=options.append,
                shell=options.shell,
                within=(lambda made: enrolled.enrolled(made, name)) if name else None,
            )
    except (ImageError, launch.LabError, CommandError, LibvmiError) as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
