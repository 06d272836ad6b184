"""URLs, passwords, ACL users, TLS and IAM tokens. Whatever goes wrong, no secret is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from botocore.auth import SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import ProfileNotFound
from redis.credentials import CredentialProvider

from expertmesh.errors import ConfigError
from expertmesh.kv_store import Endpoint, IamLogin, StoreClient, StoreClosed, StoreError, StoreRefused, StoreSettings
from expertmesh.kv_store.channel import Channel, Reply
from expertmesh.kv_store.credentials import provider_of
from expertmesh.kv_store.iam import TOKEN_LIFE_S, TOKEN_RENEWAL_S, IamCredentials
from expertmesh.kv_store.node import CONNECTION_LIFE_S, Node
from tests.kv_store.conftest import PASSWORD
from tests.kv_store.servers import PATIENCE_S, Server, command, until

NewClient = Callable[[StoreSettings], StoreClient]


@contextmanager
def node_of(
    settings: StoreSettings, provider: CredentialProvider | None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Node]:
    with closing(Node(settings.endpoint, settings, provider, clock)) as node:
        yield node


def asked(node: Node) -> list[Reply]:
    return node.run(lambda channel: channel.exists([b"a"], deadline()), deadline(), True)


def deadline() -> float:
    return time.monotonic() + PATIENCE_S


@pytest.mark.parametrize(
    ("url", "settings"),
    [
        ("redis://host", StoreSettings(Endpoint("host", 6379))),
        ("redis://:p%40ss@host:1/", StoreSettings(Endpoint("host", 1), password="p@ss")),
        ("rediss://user:pass@host:2/0", StoreSettings(Endpoint("host", 2, True), "user", "pass")),
        ("rediss://host?cluster=true", StoreSettings(Endpoint("host", 6379, True), cluster=True)),
        ("redis://[::1]:7?cluster=false", StoreSettings(Endpoint("::1", 7))),
        ("unix:///run/socket", StoreSettings(Endpoint(path="/run/socket"))),
    ],
)
def test_urls(url: str, settings: StoreSettings) -> None:
    assert StoreSettings.from_url(url) == settings


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://:secret@host:port", "is not a URL"),
        ("redis://:secret@[host", "is not a URL"),
        ("http://:secret@host", "a http URL of this form; allowed: redis://HOST"),
        ("host:6379", "a host URL"),
        ("", "a nameless URL"),
        ("redis://:secret@/", "a redis URL of this form"),
        ("redis://host/1", "a redis URL of this form"),
        ("unix://host/path", "a unix URL of this form"),
        ("unix:///" + "x" * 107, "a unix URL of this form"),
        ("redis://:secret@host?tls=yes", "unknown option 'tls'; allowed: cluster"),
        ("redis://:secret@host?cluster=yes", "cluster must be true or false"),
        ("unix:///path?cluster=true", "can't be reached by a unix socket"),
        ("redis://user@host", "a password is missing for the user 'user'"),
    ],
)
def test_urls_that_are_refused(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        StoreSettings.from_url(url)
    assert "secret" not in str(caught.value)


IAM = IamLogin("cache", "eu-west-1")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda: StoreSettings(Endpoint("h", 1), ca_file=Path("ca.pem")), "a CA file is for rediss:// only"),
        (lambda: StoreSettings(Endpoint("h", 1, True), ca_file=Path("none.pem")), "'none.pem' is not there"),
        (lambda: StoreSettings(Endpoint("h", 1), "user", iam=IAM), "needs TLS"),
        (lambda: StoreSettings(Endpoint("h", 1, True), "user", "secret", iam=IAM), "there is no password"),
        (lambda: StoreSettings(Endpoint("h", 1, True), iam=IAM), "needs the user name"),
    ],
)
def test_settings_that_can_not_go_together(settings: Callable[[], StoreSettings], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings()


def test_a_password_is_not_shown() -> None:
    settings = StoreSettings.from_url(f"redis://:{PASSWORD}@host")
    assert PASSWORD not in repr(settings) + str(settings) + str(settings.endpoint)


def tls_settings(server: Server, ca_file: Path | None, password: str = PASSWORD) -> StoreSettings:
    return StoreSettings(Endpoint("127.0.0.1", int(server.config["tls-port"]), True), "mesh", password, ca_file=ca_file)


def one(client: StoreClient) -> object:
    return client.exists([b"xm1:a"], PATIENCE_S)[0]


def test_tls_with_a_ca_and_an_acl_user(tls_redis: tuple[Server, Path], new_client: NewClient) -> None:
    server, ca_file = tls_redis
    client = new_client(tls_settings(server, ca_file))
    value, memory = memoryview(bytes(range(256)) * 5000), memoryview(bytearray(256 * 5000))
    assert client.set([(b"xm1:a", [value]), (b"xm1:b", [value])], 60, PATIENCE_S) == [len(value)] * 2
    assert client.get([(b"xm1:a", [memory]), (b"xm1:none", [memory[:10]])], PATIENCE_S) == [len(value), None]
    assert memory == value
    (outside,) = client.exists([b"other:a"], PATIENCE_S)
    assert isinstance(outside, StoreRefused)
    assert outside.code == "NOPERM"
    assert one(client) == 1, "what one key is refused for does not concern others"


def test_a_server_whose_certificate_nobody_vouches_for(tls_redis: tuple[Server, Path], new_client: NewClient) -> None:
    server, _ = tls_redis
    reply = one(new_client(tls_settings(server, None)))
    assert isinstance(reply, StoreClosed)
    assert "certificate verify failed" in str(reply)


def test_a_certificate_for_another_host(tls_redis: tuple[Server, Path], new_client: NewClient) -> None:
    server, ca_file = tls_redis
    settings = StoreSettings(
        Endpoint("localhost", int(server.config["tls-port"]), True), "mesh", PASSWORD, False, ca_file
    )
    reply = one(new_client(settings))
    assert isinstance(reply, StoreClosed)
    assert "not valid for 'localhost'" in str(reply)


def test_plain_text_to_a_tls_port(tls_redis: tuple[Server, Path], new_client: NewClient) -> None:
    server, _ = tls_redis
    endpoint = Endpoint("127.0.0.1", int(server.config["tls-port"]))
    assert isinstance(one(new_client(StoreSettings(endpoint, password=PASSWORD))), StoreError)


def test_a_wrong_password_over_tls(tls_redis: tuple[Server, Path], new_client: NewClient) -> None:
    server, ca_file = tls_redis
    reply = one(new_client(tls_settings(server, ca_file, "another-secret")))
    assert isinstance(reply, StoreRefused)
    assert reply.code == "WRONGPASS"
    assert "another-secret" not in str(reply)


AWS = Credentials("AKIDEXAMPLE", "aws-secret", "session-token")


def iam(clock: Callable[[], float], credentials: Credentials | None = AWS, login: IamLogin = IAM) -> IamCredentials:
    return IamCredentials(login, "mesh-user", lambda: credentials, clock)


@pytest.mark.parametrize("serverless", [False, True])
def test_a_token_is_a_request_signed_with_sigv4(serverless: bool) -> None:
    user, token = iam(lambda: 0.0, login=IamLogin("cache", "eu-west-1", serverless)).get_credentials()
    assert user == "mesh-user"
    url = urlsplit("https://" + token)
    query = {name: values[0] for name, values in parse_qs(url.query).items()}
    assert url.netloc == "cache"
    assert query["Action"] == "connect"
    assert query["User"] == "mesh-user"
    assert query.get("ResourceType") == ("ServerlessCache" if serverless else None)
    assert query["X-Amz-Expires"] == str(TOKEN_LIFE_S) == "900"
    assert query["X-Amz-Credential"].endswith("/eu-west-1/elasticache/aws4_request")
    assert query["X-Amz-Security-Token"] == "session-token"

    # The signature is that of these parameters: made again from them, by the same rules, at the same time.
    signer = SigV4QueryAuth(AWS, "elasticache", "eu-west-1", expires=TOKEN_LIFE_S)
    unsigned = "&".join(part for part in url.query.split("&") if not part.startswith("X-Amz-Signature="))
    request = AWSRequest(method="GET", url=f"https://cache/?{unsigned}")
    request.context["timestamp"] = query["X-Amz-Date"]
    canonical = signer.canonical_request(request)
    assert signer.signature(signer.string_to_sign(request, canonical), request) == query["X-Amz-Signature"]


def test_a_token_is_used_until_it_is_old() -> None:
    now = [1000.0]
    keys = iter([AWS, Credentials("OTHER", "other-secret")])
    provider = IamCredentials(IAM, "mesh-user", lambda: next(keys), lambda: now[0])
    first = provider.get_credentials()
    now[0] += TOKEN_RENEWAL_S - 1
    assert provider.get_credentials() == first
    now[0] += 1
    renewed = provider.get_credentials()
    assert renewed != first
    assert "OTHER" in renewed[1]
    assert TOKEN_RENEWAL_S < TOKEN_LIFE_S


def test_no_aws_credentials_is_the_stores_trouble() -> None:
    with pytest.raises(StoreClosed, match="no AWS credentials"):
        iam(lambda: 0.0, None).get_credentials()


def test_aws_credentials_that_can_not_be_had_are_the_stores_trouble() -> None:
    def failing() -> Credentials:
        raise ProfileNotFound(profile="nobody")

    with pytest.raises(StoreClosed, match="nobody"):
        IamCredentials(IAM, "mesh-user", failing).get_credentials()


def test_a_host_name_that_can_not_be_one(new_client: NewClient) -> None:
    reply = one(new_client(StoreSettings(Endpoint("x" * 70 + ".example", 1))))
    assert isinstance(reply, StoreClosed)


def test_iam_without_aws_credentials_is_a_miss(
    tls_redis: tuple[Server, Path], new_client: NewClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server, ca_file = tls_redis
    endpoint = Endpoint("127.0.0.1", int(server.config["tls-port"]), True)
    reply = one(new_client(StoreSettings(endpoint, "mesh", ca_file=ca_file, iam=IAM)))
    assert isinstance(reply, StoreClosed)
    assert "no AWS credentials" in str(reply)


def test_an_iam_token_logs_in_where_it_is_the_password(server: Server, settings: StoreSettings) -> None:
    """A server that takes a token as ElastiCache does: as the password of the user that it names."""
    provider = iam(lambda: 0.0)
    user, token = provider.get_credentials()
    command(settings.endpoint.port, "ACL", "SETUSER", user, "on", ">" + token, "~*", "+@all", password=PASSWORD)
    with node_of(settings, provider) as node:
        assert asked(node) == [None]


def test_a_connection_is_replaced_before_aws_cuts_it(server: Server, settings: StoreSettings) -> None:
    now = [0.0]

    def ids() -> set[str]:
        listed = command(settings.endpoint.port, "CLIENT LIST", password=PASSWORD)
        return {entry["id"] for entry in listed if entry["cmd"] == "exists"}

    with node_of(settings, provider_of(settings), lambda: now[0]) as node:
        asked(node)
        (first,) = ids()
        now[0] = CONNECTION_LIFE_S - 1
        asked(node)
        assert ids() == {first}
        now[0] = CONNECTION_LIFE_S
        asked(node)
        until(lambda: len(ids()) == 1, "old connection gone")
        assert ids() != {first}
    assert CONNECTION_LIFE_S < 12 * 3600


def test_each_batch_under_way_has_a_connection_of_its_own(server: Server, settings: StoreSettings) -> None:
    with node_of(settings, provider_of(settings)) as node:

        def nested(outer: Channel) -> list[list[Reply]]:
            def inside(inner: Channel) -> list[Reply]:
                assert inner is not outer
                return inner.exists([b"a"], deadline())

            return [node.run(inside, deadline(), True), outer.exists([b"a"], deadline())]

        assert node.run(nested, deadline(), True) == [[None], [None]]
