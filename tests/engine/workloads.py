"""Requests that share prefixes in the ways that served traffic does, from fixed seeds."""

from __future__ import annotations

import random
from dataclasses import replace

from tests.engine.driver import Request

__all__ = ["beams", "crowd", "forest", "grove", "identical", "repeats", "rollouts", "samples"]


def _tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(256) for _ in range(count))


def forest() -> tuple[Request, ...]:
    """Three waves: a system prompt with branches, identical prompts, unrelated ones, late joins.

    29 requests of 30 to 420 tokens. Lengths to generate are uneven, so requests leave all the
    time; waves two and three join while others run, and read what finished requests have left in
    the cache: prompts that continue a branch, repeat a prompt, or end inside one.
    """
    rng = random.Random(1)
    system = _tokens(rng, 300)
    branches = [system + _tokens(rng, 60) for _ in range(3)]
    twin = branches[0] + _tokens(rng, 9)
    deeper = branches[1] + _tokens(rng, 40)
    prompts = [branches[i % 3] + _tokens(rng, 3 + i) for i in range(9)]
    prompts += [twin, twin, twin]
    prompts += [_tokens(rng, 30 + 35 * i) for i in range(3)]
    first = [Request(f"a{i}", p, 8 + (i * 23) % 61) for i, p in enumerate(prompts)]
    prompts = [deeper + _tokens(rng, 2 + i) for i in range(5)] + [prompts[4], prompts[4][:330]]
    second = [Request(f"b{i}", p, 10 + (i * 17) % 45, after=4) for i, p in enumerate(prompts)]
    prompts = [prompts[0] + _tokens(rng, 20), system + _tokens(rng, 1), deeper, deeper, twin]
    prompts += [_tokens(rng, 50), prompts[0][:64]]
    third = [Request(f"c{i}", p, 9 + (i * 11) % 40, after=12) for i, p in enumerate(prompts)]
    return (*first, *second, *third)


def grove() -> tuple[Request, ...]:
    """A small forest for kernels in Triton's interpreter: two waves over two branches."""
    rng = random.Random(5)
    system = _tokens(rng, 120)
    branches = [system + _tokens(rng, 30) for _ in range(2)]
    prompts = [branches[i % 2] + _tokens(rng, 3 + 4 * i) for i in range(6)]
    first = [Request(f"g{i}", p, 6 + (i * 5) % 11) for i, p in enumerate(prompts)]
    prompts = [prompts[0], prompts[1] + _tokens(rng, 4), prompts[2][:130], _tokens(rng, 25)]
    second = [Request(f"h{i}", p, 5 + 3 * i, after=2) for i, p in enumerate(prompts)]
    return (*first, *second)


def crowd(count: int = 240) -> tuple[Request, ...]:
    """Hundreds of short requests over six branches of two roots, joining and leaving all the time.

    Every seventh is aborted in the middle, and its id comes back later. No id is the beginning of
    another: SGLang aborts all that begin with the one that it is given.
    """
    rng = random.Random(6)
    roots = [_tokens(rng, 60) for _ in range(2)]
    branches = [roots[i % 2] + _tokens(rng, 24) for i in range(6)]
    requests = []
    for i in range(count):
        prompt = branches[rng.randrange(6)] + _tokens(rng, 1 + rng.randrange(20))
        if i % 11 == 0:
            prompt = _tokens(rng, 20 + rng.randrange(60))
        requests.append(Request(f"m{i:03}", prompt, 6 + rng.randrange(28), after=max(0, i - 24)))
    cut = [replace(r, max_new_tokens=200, abort_after=4) for r in requests[::7]]
    return (*cut, *requests)


def identical(count: int, length: int, max_new_tokens: int) -> tuple[Request, ...]:
    """One prompt, many times."""
    prompt = _tokens(random.Random(3), length)
    return tuple(Request(f"i{i}", prompt, max_new_tokens) for i in range(count))


def beams() -> tuple[Request, ...]:
    """Beam searches over two branches, and requests beside them that end before they do."""
    rng = random.Random(4)
    system = _tokens(rng, 200)
    branches = [system + _tokens(rng, 40) for _ in range(2)]
    prompts = [branches[i % 2] + _tokens(rng, 3 + 5 * i) for i in range(6)]
    searches = [
        Request(f"j{i}", p, 24 + 3 * i, beam_width=3 + i) for i, p in enumerate(prompts[:4])
    ]
    return (*searches, *(Request(f"k{i}", p, 12 + i) for i, p in enumerate(prompts[4:])))


def repeats() -> tuple[Request, ...]:
    """Requests, and twice the same, of which tables of n-grams then know the answers."""
    rng = random.Random(9)
    system = _tokens(rng, 200)
    branches = [system + _tokens(rng, 40) for _ in range(2)]
    prompts = list(enumerate(branches[i % 2] + _tokens(rng, 3 + 4 * i) for i in range(6)))
    first = [Request(f"e{i}", p, 24 + 2 * i) for i, p in prompts]
    # Shorter, so that what the tables know does not end before they do.
    second = [Request(f"f{i}", p, 12 + 2 * i, after=6) for i, p in prompts]
    third = [Request(f"h{i}", p, 12 + 2 * i, after=12) for i, p in prompts]
    return (*first, *second, *third)


def samples() -> tuple[Request, ...]:
    """Four requests over one prefix: the smallest batch that is worth packing, for slow kernels."""
    rng = random.Random(8)
    system = _tokens(rng, 96)
    return tuple(Request(f"s{i}", system + _tokens(rng, 2 + i), 10 + 2 * i) for i in range(4))


def questions(document_tokens: int) -> tuple[Request, ...]:
    """Questions of some tokens about one document, which the first brings into the cache."""
    rng = random.Random(7)
    document = _tokens(rng, document_tokens)
    prompts = [document + _tokens(rng, 3 + 4 * i) for i in range(12)]
    return tuple(Request(f"d{i}", p, 1, after=int(i > 0)) for i, p in enumerate(prompts))


def rollouts() -> tuple[Request, ...]:
    """Samples of two prompts, two of each, and of five prompts that continue them."""
    rng = random.Random(6)
    system = _tokens(rng, 300)
    groups = [system + _tokens(rng, 50) for _ in range(2)]
    prompts = [*groups, *groups, *(groups[i % 2] + _tokens(rng, 1 + 3 * i) for i in range(5))]
    return tuple(Request(f"r{i}", p, 16 + i) for i, p in enumerate(prompts))
