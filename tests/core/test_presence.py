"""Processes find each other, whatever an earlier start has left, and see who has ended."""

import os
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from rlhf_fast.presence import Presence, answers, meet


def test_nobody_answers_for_a_process_that_has_ended():
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        own = Presence("127.0.0.1")
        os.write(write, f"{own.address[1]}\n".encode())
        child = os.fork()  # as a reward function may: it lives on and does not answer
        if child:
            os.write(write, f"{child}\n".encode())
        time.sleep(30)
        os._exit(0)
    with os.fdopen(read) as said:
        address, child = ("127.0.0.1", int(said.readline())), int(said.readline())
        assert answers(address) and answers(address)
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        assert not answers(address)
        os.kill(child, 9)
    os.close(write)
    assert answers(None)


def test_all_processes_of_a_start_get_one_token_and_every_start_another():
    """The store keeps what an earlier start wrote, and what a process wrote that died before the others came."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))

    def start(ranks):
        tokens = {}
        threads = [
            threading.Thread(target=lambda rank=rank: tokens.update({rank: meet(store, rank, 3)})) for rank in ranks
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return tokens

    first = start((0, 1, 2))
    assert len({*first.values()}) == 1 and len(first) == 3
    store.set("rlhf_fast/come/1", "of a process that has died")
    second = start((2, 0, 1))
    assert len({*second.values()}) == 1 and second[0] != first[0]
