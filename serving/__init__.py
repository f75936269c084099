"""The HTTP server: OpenAI's completions and chat completions over the asynchronous engine."""

from specdec.serving.app import create_app
from specdec.serving.live import ServerView
from specdec.serving.server import Server

__all__ = ["Server", "ServerView", "create_app"]
