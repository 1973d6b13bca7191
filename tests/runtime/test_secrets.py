"""Secrets stay out of what is shown or stored."""

from __future__ import annotations

import pytest

from scale_digrap.runtime.secrets import is_secret_key, mask, mask_tree


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pa55@host/a.tar", "https://***@host/a.tar"),
        ("https://token@host:80/a", "https://***@host:80/a"),
        ("s3://b/a?X-Amz-Signature=abc&X-Amz-Date=1", "s3://b/a?X-Amz-Signature=***&X-Amz-Date=***"),
        ("read https://h/a.tar?sig=x%2F1 failed", "read https://h/a.tar?sig=*** failed"),
        ("no URL: a@b ?x=1", "no URL: a@b ?x=1"),
        ("https://h/{0..3}.tar", "https://h/{0..3}.tar"),
    ],
)
def test_urls(text, shown):
    assert mask(text) == shown


@pytest.mark.parametrize(
    "key",
    ["HF_TOKEN", "WANDB_API_KEY", "aws_secret_access_key", "password", "db.passwd", "apiKey", "AWS_SESSION_TOKEN",
     "key", "AZURE_STORAGE_SAS_TOKEN", "account_key", "Authorization", "GITHUB_PAT_TOKEN", "secret"],
)  # fmt: skip
def test_names_of_secrets(key):
    assert is_secret_key(key)


@pytest.mark.parametrize(
    "key", ["max_new_tokens", "image_token", "author", "monkey", "keep", "NCCL_DEBUG", "cluster_key"]
)
def test_names_of_other_things(key):
    assert not is_secret_key(key)


def test_trees():
    tree = {"data": {"train": ["https://u:p@h/a"], "storage_options": {"key": "AKIA", "secret": "s", "anon": False}}}
    assert mask_tree(tree) == {
        "data": {"train": ["https://***@h/a"], "storage_options": {"key": "***", "secret": "***", "anon": False}}
    }
    assert mask_tree({"tokens": 3, "password": 12}) == {"tokens": 3, "password": "***"}
