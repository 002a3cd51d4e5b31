"""``dist-vpt`` for many short commands: a server that has imported the package once forks for each of them.

    python -m tests.docs.command_server SOCKET      the server; a line on its standard output says that it is ready

``write_command`` writes a ``dist-vpt`` that hands its arguments, folder and open files to the server, and ends with the
exit code of the process that the server has forked. ``dist-vpt python TEXT`` runs a program there.
"""

import importlib
import json
import os
import pkgutil
import socket
import stat
import sys
from pathlib import Path

CLIENT = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = json.dumps([os.getcwd(), dict(os.environ), sys.argv[1:]]).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(request)
    sys.exit(int(server.recv(8) or 1))
"""
ALSO_IMPORTED = ("sklearn.datasets", "torch.utils.tensorboard")  # where they are used, by what every run needs


def write_command(folder: Path, address: Path) -> None:
    """``dist-vpt`` in a folder for the PATH."""
    command = folder / "dist-vpt"
    command.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    command.chmod(command.stat().st_mode | stat.S_IXUSR)


def serve(address: str) -> None:
    """Fork a process for every command that comes, until the server is ended."""
    import dist_vpt

    for module in pkgutil.walk_packages(dist_vpt.__path__, "dist_vpt."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ALSO_IMPORTED:
        importlib.import_module(name)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        while True:
            client, _ = server.accept()
            if os.fork() == 0:
                server.close()
                if os.fork() == 0:  # the command; its parent waits for it and tells the client
                    run(client)
                status = os.waitstatus_to_exitcode(os.wait()[1])
                client.sendall(str(status if status >= 0 else 128 - status).encode())
                os._exit(0)
            client.close()


def run(client: socket.socket) -> None:
    """Become the command that the client has asked for."""
    size, files, _, _ = socket.recv_fds(client, 8, 3)
    request = b""
    while len(request) < int.from_bytes(size, "big"):
        request += client.recv(2**16)
    folder, environment, arguments = json.loads(request)
    client.close()
    for target, file in enumerate(files):
        os.dup2(file, target)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["dist-vpt", *arguments]
    code: object = 1
    try:
        if arguments[0] == "python":
            exec(compile(arguments[1], "block", "exec"), {"__name__": "__main__"})
            code = 0
        else:
            from dist_vpt.cli.main import main

            code = main(arguments)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    serve(sys.argv[1])
