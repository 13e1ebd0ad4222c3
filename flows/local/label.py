"""`rlhf label`: the page for annotators in this process; and links that let people in."""

from collections.abc import Callable
from getpass import getuser
from ipaddress import ip_address
from socket import socket
from typing import Literal
from urllib.parse import urlsplit

from fastapi import FastAPI

from flows.local import find, serve
from rlhf_core.errors import UserError
from tasks.feedback.admin.people import Roster
from tasks.feedback.asking.watching import watching
from tasks.feedback.page.app import Served, create_app
from tasks.feedback.page.shield import Address
from tasks.feedback.store.store import Store
from tasks.servers.gate import LOOPBACK
from tasks.settings import Settings

Role = Literal["annotator", "admin"]
Say = Callable[[str], None]


def serve_label(
    settings: Settings,
    project: str,
    *,
    host: str,
    port: int,
    url: str | None,
    say: Say,
    warn: Say,
) -> None:
    """Serve the page until Ctrl-C, and print a link for an admin and one for an annotator.

    Raises: UserError for a project that there is not, a port in use, an address that is none, or a
        store that cannot be opened.
    """
    public = _public(settings, host, port, url)
    running = find.running(settings)
    if running is not None and running.label.endswith(f":{port}"):
        raise UserError(
            f"`rlhf up` serves the page at {running.label} already: `rlhf feedback invite "
            f"{project}` prints a link to it, or choose another port with --port."
        )
    find.make_home(settings)
    store = Store.open(settings)
    roster = Roster(store.project(project))
    serve.check_ports({"--port": port}, host)
    app = create_app(store, address=Address(public, port))

    def ready() -> None:
        me = getuser()
        say(f"The project {project} is served at {public}; press Ctrl-C to stop.")
        say("Open these links; each one lets in one browser, once:")
        roles: dict[str, Role] = {"to label": "annotator", "to run the project": "admin"}
        for what, role in roles.items():
            say(f"  {what:20}{public}/enter/{roster.own_link(me, role)}")
        if not _is_loopback(host) and urlsplit(public).scheme != "https":
            warn(
                f"others on the network can read what {public} sends, links included: put a proxy "
                "with TLS before it, and give its address with --url https://..."
            )

    try:
        with watching(store, find.join(settings, prefect=True)):
            _Told(app, host, port, ready).run()
    except KeyboardInterrupt:
        say("Stopped. What was labelled is kept.")
    finally:
        store.close()


class _Told(Served):
    """A server that says when it is ready."""

    def __init__(self, app: FastAPI, host: str, port: int, ready: Callable[[], None]) -> None:
        super().__init__(app, host=host, port=port)
        self._ready = ready

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        if self.started:
            self._ready()


def invitation(
    settings: Settings, project: str, *, name: str, role: Role, days: float, back: str, by: str
) -> str:
    """A link that lets in one person.

    Args:
        back: the pseudonym of somebody who comes back; empty = a new person.

    Raises: UserError for a project or a person that there is not.
    """
    running = find.running(settings)
    public = running.label if running and running.label else settings.label_public_url
    store = Store.open(settings)
    try:
        roster = Roster(store.project(project))
        if back:
            token = roster.link_for(roster.find(back), by, days=days)
        else:
            token = roster.invite(role=role, by=by, name=name, days=days)
    finally:
        store.close()
    return f"{public}/enter/{token}"


def _public(settings: Settings, host: str, port: int, url: str | None) -> str:
    if url is not None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
            raise UserError(
                f"--url is '{url}': give the address that browsers use, without a path, as "
                "https://label.example.org"
            )
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    if "label_public_url" in settings.model_fields_set:
        return settings.label_public_url
    if host in ("0.0.0.0", "::", ""):
        raise UserError(
            f"--host {host} lets other machines in, and links need the address that they use: add "
            "--url, as https://label.example.org"
        )
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host in LOOPBACK
