"""Stage 5: people vote, blind, on which of two models searches better.

Reads   embeddings/master.parquet (stage 4; give --embeddings several times to compare more than two models), photos
Writes  arena.sqlite: trials and votes, inserted only; arena.sqlite.cache/ and .keys.json beside it

serve   the voting page (A, B, T tie, N skip, U undo, Q quit), and the results page behind the admin link it prints
stats   the results, recomputed from the log, as text or with --format json
votes   every vote, as CSV or with --format json

    python 5_arena.py serve --embeddings data/embeddings/master.parquet --images data/photos \\
        --database data/arena.sqlite
    python 5_arena.py stats --embeddings data/embeddings/master.parquet --images data/photos \\
        --database data/arena.sqlite
"""

from __future__ import annotations

import argparse
import base64
import functools
import hmac
import io
import json
import math
import os
import secrets
import sqlite3
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from arena_log import Log, Refused, new_judge
from arena_results import band, e_value, export, interval, p_value, percent, points, report, results, ticks
from arena_trials import Draw, Experiment, Items, experiment_key, note
from common import (
    DONE,
    USAGE,
    ArenaConfig,
    Fail,
    add_flags,
    entry_point,
    exclusive,
    from_flags,
    images_folder,
    read_json,
    whole_file,
    write_whole,
)
from imaging import BadImage, letterbox, load_image, resolve_image
from retrieval import top_k

LOOPBACK = ("127.0.0.1", "localhost", "::1")
BODY_LIMIT = 4_096  # bytes of a vote or a name
UPLOAD_LIMIT = 12_000_000  # bytes of a picture on the search page
CONNECTIONS = 800  # open at once: a browser keeps up to six, and most systems allow a process 1,024 files
POLICY = (
    "default-src 'none'; img-src 'self' blob: data:; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


# --------------------------------------------------------------------------------------------------------------------
# Pictures


class Pictures:
    """Photos as the browser gets them: letterboxed to one size, encoded anew, so that no byte tells a file's origin."""

    def __init__(self, items: Items, folder: Path, side: int):
        self.items, self.folder, self.side = items, folder, side
        self.missing: set[int] = set()
        self.turns = threading.Semaphore(max(1, (os.cpu_count() or 2) - 1))  # votes must not wait behind pictures
        self.jpeg = functools.lru_cache(2_000)(self._jpeg)  # about 60 MB at 480 px

    def _jpeg(self, row: int) -> bytes:
        try:
            path = resolve_image(self.folder, self.items.text("image_path", row))
            with self.turns:
                return self.encode(load_image(path, self.side))
        except BadImage as error:
            if row not in self.missing:
                self.missing.add(row)
                name = self.items.text("image_id", row)
                note(f"missing picture: item {name!r}: {error}; a grey placeholder is shown")
            return self.placeholder

    def encode(self, image) -> bytes:
        """A picture of any size as a square JPEG on white, without metadata.

        Pillow scales it, not imaging.letterbox: threads of BLAS in threads of a server burn ten times the processor.
        """
        from PIL import Image, ImageOps

        buffer = io.BytesIO()
        square = ImageOps.pad(image, (self.side, self.side), Image.Resampling.LANCZOS, color="white")
        square.save(buffer, "JPEG", quality=85)
        return buffer.getvalue()

    @functools.cached_property
    def placeholder(self) -> bytes:
        from PIL import Image, ImageDraw

        image = Image.new("RGB", (self.side, self.side), (228, 228, 226))
        unit = self.side // 12
        box = (4 * unit, 4.5 * unit, 8 * unit, 7.5 * unit)
        ImageDraw.Draw(image).rectangle(box, outline=(168, 168, 166), width=max(2, self.side // 120))
        ImageDraw.Draw(image).line((*box[:2], *box[2:]), fill=(168, 168, 166), width=max(2, self.side // 120))
        return self.encode(image)


# --------------------------------------------------------------------------------------------------------------------
# Search, for --reveal


class Finder:
    """Searches all items with each model; the models are loaded by the first search."""

    def __init__(self, experiment: Experiment):
        self.experiment, self.lock, self.loaded = experiment, threading.Lock(), None

    def models(self) -> list:
        """(model, CLIP) of each model. Raises Fail where the weights are not those that made the vectors."""
        from clip import load_clip, model_place

        with self.lock:
            if self.loaded is None:
                loaded = []
                for model in self.experiment.models:
                    name = model.items.facts.get(f"{model.kind}_model", "")
                    clip = load_clip(*model_place(name, model.items.path))
                    if clip.fingerprint != model.fingerprint:
                        raise Fail(f"{name}: not the model that made the vectors any more; run 4_embed.py again")
                    loaded.append((model, clip))
                self.loaded = loaded
        return self.loaded

    def __call__(self, words: str = "", picture=None, k: int = 8) -> list[tuple[str, list[dict[str, Any]]]]:
        """(model's name, its hits best first) for words or an RGB picture."""
        import numpy as np
        import torch

        from clip import encode_image, encode_text

        found = []
        for model, clip in self.models():
            with self.lock:
                if picture is None:
                    query = encode_text(clip, [words])
                else:
                    pixels = torch.from_numpy(np.array(letterbox(picture, clip.size))).permute(2, 0, 1)
                    query = encode_image(clip, pixels[None])
            scores, rows = top_k(query.cpu().numpy(), model.items.chunks(f"{model.kind}_embedding"), k)
            hits = [
                {"row": row, "score": score} | {name: model.items.text(name, row) for name in ("title", "object_type")}
                for row, score in zip(rows[0].tolist(), scores[0].tolist(), strict=True)
                if row >= 0
            ]
            found.append((model.name, hits))
        return found


# --------------------------------------------------------------------------------------------------------------------
# The application


@dataclass(frozen=True)
class Setup:
    """What an application needs besides its settings. Tokens and the cookie's key come from `read_keys`."""

    embeddings: tuple[str, ...]
    images: str
    database: str
    settings: ArenaConfig = field(default_factory=ArenaConfig)
    keys: dict[str, str] | None = None

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the server, so that judges need no token."""
        return self.settings.host in LOOPBACK


def read_keys(database: str | Path) -> dict[str, str]:
    """The cookie's key, the judges' and the admin's token: kept beside the database, readable by its owner only.

    ARENA_JUDGE_TOKEN and ARENA_ADMIN_TOKEN in the environment take precedence.
    """
    path = Path(f"{database}.keys.json")
    names = ("cookie_key", "judge_token", "admin_token")
    keys = {name: secrets.token_urlsafe(24) for name in names}
    if path.is_file():
        kept = read_json(path, "file of keys")
        if not isinstance(kept, dict) or not all(str(kept.get(name)).isascii() for name in names):
            raise Fail(f"{path}: not a file of keys; remove it, and give judges and admin the new links")
        keys |= {name: str(kept[name]) for name in names if kept.get(name)}
    else:
        with whole_file(path) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_text(json.dumps(keys, indent=2) + "\n")
    given = {name: os.environ.get(f"ARENA_{name.upper()}") for name in names[1:]}
    return keys | {name: value for name, value in given.items() if value}


class Arena:
    """An experiment with its log, its drawing and its pictures: what the routes work on."""

    def __init__(self, setup: Setup):
        self.setup, self.settings = setup, setup.settings
        self.keys = setup.keys or read_keys(setup.database)
        folder = images_folder(setup.images, [setup.embeddings[0]])
        cache = Path(f"{setup.database}.cache")
        self.experiment = Experiment([Items(path, cache) for path in setup.embeddings], self.settings)
        self.log = Log(setup.database)
        self.number = self.log.experiment(self.experiment.key, self.experiment.facts)
        self.draw = Draw(self.experiment, self.log, self.number)
        self.pictures = Pictures(self.experiment.items, folder, self.settings.picture_size)
        self.computed = functools.lru_cache(1)(lambda state: results(self.log, self.row))

    @property
    def row(self) -> dict[str, Any]:
        """The experiment as the log has it."""
        return next(row for row in self.log.experiments() if row["id"] == self.number)

    def results(self, named: bool) -> dict[str, Any]:
        """The results of all votes so far, computed again when there is another; `named` with the judges' names."""
        found = self.computed(self.log.state())
        if named:
            return found
        judges = [row | {"name": f"judge {number}"} for number, row in enumerate(found["judges"], start=1)]
        return found | {"judges": [{k: v for k, v in row.items() if k != "judge"} for row in judges]}

    def trial(self, judge: str, after: str | None = None) -> dict[str, Any]:
        """What the browser is told of the current trial, or of the one after it."""
        try:
            row = self.log.trial(self.number, judge, after, functools.partial(self.draw, judge))
        except sqlite3.Error:
            self.draw.stale = True  # it has counted what was not committed
            raise
        last = self.log.last_vote(self.number, judge)
        counts = self.log.own_counts(self.number, judge)
        answer = {"trial": row["token"] if row else None, "undo": last["token"] if last else None}
        answer |= {"votes": sum(counts.values()), "decided": self.log.decided(self.number)}
        if row and self.settings.query == "text":
            answer["words"] = self.experiment.items.text("prompt", self.experiment.row(row["query"]))
        return answer

    def picture(self, judge: str, token: str, place: int) -> bytes:
        """JPEG: place 0 is the query, then row A, then row B. Raises Refused for a token that is not the judge's."""
        row = self.log.find(self.number, judge, token)
        shown = [row["query"], *json.loads(row["left_items"]), *json.loads(row["right_items"])]
        hidden = place == 0 and self.settings.query == "text"  # the words are the query, not their item's picture
        if row["vote"] is not None or row["identical"] or hidden or place >= len(shown):
            raise Refused(404, "There is no such picture for you.")
        return self.pictures.jpeg(self.experiment.row(shown[place]))


def create_app(setup: Setup):
    """The Flask application: pages for judges, the results page, and the search page where --reveal allows it."""
    from flask import Flask

    root = Path(__file__).parent / "templates"
    app = Flask("arena", root_path=str(root), template_folder=str(root), static_folder=str(root / "static"))
    arena = Arena(setup)
    app.config.update(
        SECRET_KEY=arena.keys["cookie_key"],
        SESSION_COOKIE_NAME="judge",
        SESSION_COOKIE_HTTPONLY=True,
        SESSION_COOKIE_SAMESITE="Lax",
        SESSION_REFRESH_EACH_REQUEST=False,
        MAX_CONTENT_LENGTH=BODY_LIMIT,
        MAX_FORM_MEMORY_SIZE=BODY_LIMIT,
        TRUSTED_HOSTS=trusted_hosts(setup.settings),
        SEND_FILE_MAX_AGE_DEFAULT=0,
        PERMANENT_SESSION_LIFETIME=90 * 86_400,
    )
    app.extensions["arena"] = arena
    app.url_map.merge_slashes = False
    app.jinja_env.trim_blocks = app.jinja_env.lstrip_blocks = True
    guard(app)
    add_judge_pages(app, arena)
    add_result_pages(app, arena)
    if arena.settings.reveal:
        add_search_page(app, arena)
    return app


def trusted_hosts(settings: ArenaConfig) -> list[str]:
    """Names that the Host header may carry."""
    import socket

    names = {name for name in (settings.trusted_host or "").split(",") if name}
    if settings.host in LOOPBACK:
        return sorted(names | {"127.0.0.1", "localhost", "[::1]"})
    names |= {"127.0.0.1", "localhost", socket.gethostname(), socket.getfqdn()}
    if settings.host not in ("0.0.0.0", "::"):
        names.add(settings.host)
    else:
        try:
            names |= {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
        except OSError:
            note("this machine's addresses are unknown; name them with --trusted-host")
    return sorted(names)


def guard(app) -> None:
    """What holds for every request: posts from the own pages only, the headers, and errors in a person's words."""
    from flask import jsonify, render_template, request, session
    from werkzeug.exceptions import HTTPException, SecurityError

    def csrf() -> str:
        """What the forms and the script of this browser's pages send along, and no other site's page can know.

        A browser without a cookie gets one here, with a judge's id that the log does not hold yet.
        """
        if "judge" not in session:
            session["judge"], session.permanent = new_judge(), True
        return hmac.new(app.secret_key.encode(), f"csrf {session['judge']}".encode(), "sha256").hexdigest()

    app.jinja_env.globals["csrf"] = csrf

    @app.before_request
    def own_page():
        """Refuse posts without the token. The Origin header would not do: no-referrer makes browsers hide it."""
        if request.method in ("GET", "HEAD", "OPTIONS"):
            return
        if request.endpoint == "search_picture":
            request.max_content_length = UPLOAD_LIMIT
        given = request.headers.get("X-CSRF-Token") or request.form.get("csrf", "")
        if "judge" not in session or not hmac.compare_digest(given.encode(), csrf().encode()):
            raise Refused(403, "This did not come from the arena's own page. Open that anew, with cookies allowed.")

    @app.after_request
    def add_headers(response):
        response.headers.update(HEADERS)
        return response

    def answer(status: int, message: str):
        if request.path.startswith(("/trial", "/vote", "/undo", "/picture")):
            return jsonify(error=message), status
        return render_template("message.html", status=status, message=message), status

    @app.errorhandler(SecurityError)
    def unknown_host(error):
        return "The server is not known by that name; --trusted-host would make it known.\n", 400

    @app.errorhandler(HTTPException)
    def http_error(error):
        return answer(error.code, {404: "There is no such page."}.get(error.code, error.description))

    @app.errorhandler(Refused)
    def refused(error):
        return answer(error.status, str(error))

    @app.errorhandler(Fail)
    def failed(error):
        note(str(error))
        return answer(500, str(error))

    @app.errorhandler(sqlite3.Error)
    def not_saved(error):
        """Nothing was committed, so nothing is acknowledged; the page keeps the vote and tries again."""
        note(f"database: {error}; requests are answered with 503 until this is mended")
        body, status = answer(503, "The vote could not be saved just now. Nothing is lost; it is tried again.")
        return body, status, {"Retry-After": "2"}


def admin_badge(app):
    """Signs and reads the admin's cookie; another admin token makes the old cookies worthless."""
    from itsdangerous import URLSafeSerializer

    return URLSafeSerializer(app.secret_key, salt="admin " + app.extensions["arena"].keys["admin_token"])


def must_see(app, arena: Arena) -> bool:
    """Whether the admin asks. Raises Refused for others, but with --reveal only for judges who have not finished."""
    from flask import request, session
    from itsdangerous import BadSignature

    try:
        if admin_badge(app).loads(request.cookies.get("admin", "")) == "admin":
            return True
    except BadSignature:
        pass
    if not arena.settings.reveal:
        raise Refused(403, "Results are for the admin: open the link that the server printed when it started.")
    judge = session.get("judge")
    if judge and arena.log.session(arena.number, judge):
        raise Refused(403, "Results would color your next answers. Quit first; then you may look.")
    return False


def add_judge_pages(app, arena: Arena) -> None:
    """Start, vote, thanks: nothing here knows more of a model than a trial's token."""
    from flask import Response, redirect, render_template, request, session

    def judge(must: bool = True) -> str | None:
        """The judge of this request's cookie who has an open session."""
        found = arena.log.judge(session.get("judge"))
        if found and arena.log.session(arena.number, found["id"]):
            return found["id"]
        if must:
            raise Refused(403, "Your session has ended, or this browser has none yet; open the first page to start.")
        return None

    def posted(*names: str) -> list:
        """Fields of a JSON object in the request's body."""
        try:
            body = request.get_json()
        except RecursionError:  # lists in lists in lists
            body = None
        if not isinstance(body, dict) or not all(isinstance(body.get(name), str | None) for name in names):
            raise Refused(400, "A JSON object is expected.")
        return [body.get(name) for name in names]

    @app.get("/")
    def index():
        """The voting page; before it, once, the page that asks for a name."""
        if judge(must=False):
            return render_template("arena.html", settings=arena.settings)
        known = arena.log.judge(session.get("judge"))
        asked = not arena.setup.local and not known
        token = request.args.get("token", "")
        return render_template("start.html", known=known, asked=asked, token=token, settings=arena.settings)

    @app.post("/start")
    def start():
        known = arena.log.judge(session.get("judge"))
        token = request.form.get("token", "").strip()
        if not (known or arena.setup.local or hmac.compare_digest(token.encode(), arena.keys["judge_token"].encode())):
            raise Refused(403, "That is not the judges' token. Ask for the link with the token in it.")
        name = " ".join(request.form.get("name", "").split())[:60]
        arena.log.start(arena.number, session["judge"], name)
        session.modified = True  # the cookie's 90 days begin anew
        return redirect("/", 303)

    @app.post("/trial")
    def trial():
        """The trial to judge now, or the one `after` it, which the page fetches ahead."""
        return arena.trial(judge(), *posted("after"))

    @app.get("/picture/<token>/<int:place>")
    def picture(token: str, place: int):
        return Response(arena.picture(judge(), token, place), mimetype="image/jpeg")

    @app.post("/vote")
    def vote():
        token, choice = posted("trial", "choice")
        return arena.log.vote(arena.number, judge(), token, choice)

    @app.post("/undo")
    def undo():
        who = judge()
        arena.log.undo(arena.number, who, *posted("trial"))
        return arena.trial(who)

    @app.post("/quit")
    def leave():
        if who := judge(must=False):
            arena.log.quit(arena.number, who)
        return redirect("/thanks", 303)

    @app.get("/thanks")
    def thanks():
        who = session.get("judge")
        counts = arena.log.own_counts(arena.number, who) if who else {}
        finished = judge(must=False) is None
        return render_template("thanks.html", counts=counts, settings=arena.settings, finished=finished)


def add_result_pages(app, arena: Arena) -> None:
    """Results for the admin; with --reveal for everybody who is not in the middle of voting."""
    from flask import Response, redirect, render_template, request

    app.jinja_env.filters |= {"percent": percent, "p_value": p_value, "e_value": e_value, "ticks": ticks}
    app.jinja_env.filters["log10"] = math.log10
    app.jinja_env.globals |= {"interval": interval, "points": points, "band": band}
    app.jinja_env.globals["marks_of"] = lambda top: [(tick, tick, False) for tick in ticks(top)]

    @app.get("/results")
    def show_results():
        token = request.args.get("token")
        if token is not None:
            if not hmac.compare_digest(token.encode(), arena.keys["admin_token"].encode()):
                raise Refused(403, "That is not the admin's token.")
            response = redirect("/results", 303)  # the token does not stay in the address bar
            response.set_cookie("admin", admin_badge(app).dumps("admin"), httponly=True, samesite="Lax")
            return response
        admin = must_see(app, arena)
        shown = {"found": arena.results(named=admin), "search": arena.settings.reveal, "admin": admin}
        return render_template("results.html", **shown)

    @app.get("/results.json")
    def results_json():
        return arena.results(named=must_see(app, arena))

    @app.get("/votes.csv")
    def votes_csv():
        if not must_see(app, arena):
            raise Refused(403, "The votes one by one, with the judges' names, are for the admin.")
        named = {"Content-Disposition": "attachment; filename=votes.csv"}
        return Response(export(arena.log, [arena.row], "csv"), mimetype="text/csv", headers=named)


def add_search_page(app, arena: Arena) -> None:
    """Type words or give a picture, and see every model's answers with its name on them."""
    from flask import Response, render_template, request

    finder = Finder(arena.experiment)

    def page(found: list, words: str = "", asked: bytes = b""):
        shown = {"words": words, "asked": base64.b64encode(asked).decode(), "size": arena.settings.picture_size}
        return render_template("search.html", found=found, items=f"{len(arena.experiment.items):,}", **shown)

    @app.get("/search")
    def search():
        must_see(app, arena)
        words = " ".join(request.args.get("q", "").split())[:200]
        return page(finder(words) if words else [], words)

    @app.post("/search")
    def search_picture():
        must_see(app, arena)
        given = request.files.get("picture")
        try:
            picture = load_image(given.read() if given else b"", arena.settings.picture_size)
        except BadImage as error:
            raise Refused(400, f"That picture cannot be used: {error}.") from None
        return page(finder(picture=picture), asked=arena.pictures.encode(picture))

    @app.get("/item/<int:row>")
    def item(row: int):
        must_see(app, arena)
        if row >= len(arena.experiment.items):
            raise Refused(404, "There is no such item.")
        return Response(arena.pictures.jpeg(row), mimetype="image/jpeg")


# --------------------------------------------------------------------------------------------------------------------
# The command line


def serve(setup: Setup) -> int:
    """Serve until interrupted."""
    import socket

    import waitress

    settings = setup.settings
    with exclusive(f"{setup.database}.lock") as free:
        if not free:
            raise Fail(f"{setup.database}: another arena serves it; stop that one, or give another --database")
        app = create_app(setup)
        arena = app.extensions["arena"]
        try:
            server = waitress.create_server(
                app, host=settings.host, port=settings.port, threads=settings.threads, ident=None,
                max_request_body_size=UPLOAD_LIMIT + 65_536, channel_timeout=60, connection_limit=CONNECTIONS,
                asyncore_use_poll=True,
            )  # fmt: skip
        except OSError as error:
            raise Fail(f"{settings.host}:{settings.port}: {error.strerror}; choose another --host or --port") from None
        port = getattr(server, "effective_port", settings.port)
        name = socket.gethostname() if settings.host in ("0.0.0.0", "::") else settings.host
        home = f"http://{f'[{name}]' if ':' in name else name}:{port}/"
        facts = arena.experiment.facts
        print(f"{facts['queries']} queries among {facts['items']} items; votes go to {setup.database}")
        print(f"Vote at      {home}" + ("" if setup.local else f"?token={quote(arena.keys['judge_token'])}"))
        print(f"Results at   {home}results?token={quote(arena.keys['admin_token'])}", flush=True)
        server.run()  # returns on Ctrl-C and SIGTERM
        note(f"stopped; {arena.log.decided(arena.number)} decided votes so far")
    return DONE


def choose_experiments(log: Log, embeddings: list[str] | None, settings: ArenaConfig) -> list[dict[str, Any]]:
    """The experiment of these embeddings and settings; every one of the database where none are given."""
    experiments = log.experiments()
    if not experiments:
        raise Fail(f"{log.path}: holds no experiment yet; vote first")
    if not embeddings:
        return experiments
    key = experiment_key([Items(path, Path(f"{log.path}.cache")) for path in embeddings], settings)
    chosen = [experiment for experiment in experiments if experiment["key"] == key]
    if not chosen:
        raise Fail(f"{log.path}: no votes on these embeddings with this --query and --top-k; leave out --embeddings")
    return chosen


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("serve", "stats", "votes"), help="what to do")
    parser.add_argument(
        "--embeddings", action="append", help="master.parquet of stage 4; several times to compare more models"
    )
    parser.add_argument("--images", help="folder that image_path is relative to")
    parser.add_argument("--database", required=True, help="SQLite file of trials and votes; made if it is not there")
    parser.add_argument("--format", choices=("text", "csv", "json"), help="of stats (text, json) and votes (csv, json)")
    parser.add_argument("--output", help="write stats or votes to this file instead of the terminal")
    add_flags(parser, ArenaConfig)
    return parser


@entry_point
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    settings = from_flags(ArenaConfig, args)
    if args.command == "serve":
        if not args.embeddings or not args.images:
            raise Fail("serve needs --embeddings and --images", USAGE)
        return serve(Setup(tuple(args.embeddings), args.images, args.database, settings))
    if (args.format or "") == ("csv" if args.command == "stats" else "text"):
        raise Fail(f"{args.command} has no --format {args.format}; see --help", USAGE)
    log = Log(args.database, create=False)
    with log.sound():
        experiments = choose_experiments(log, args.embeddings, settings)
        if args.command == "votes":
            text = export(log, experiments, args.format or "csv")
        else:
            found = [results(log, experiment) for experiment in experiments]
            text = "\n".join(map(report, found))
            if args.format == "json":
                text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    if args.output:
        write_whole(args.output, text)
    else:
        sys.stdout.write(text)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
