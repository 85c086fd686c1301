import threading

import pytest
import torch

from newllm_lib.system.buffer_pool import Buffers

LIKE = torch.empty(0)
ROWS = 1 << 10
BIG = (ROWS, 1 << 10)  # 4 MiB of float32


def place(tensor):
    return tensor.untyped_storage().data_ptr()


def test_a_block_is_used_again_once_its_last_tensor_is_gone():
    pool = Buffers()
    first = pool.empty(*BIG, like=LIKE)
    view, where = first[3:5], place(first)
    del first
    second = pool.empty(*BIG, like=LIKE)
    assert place(second) != where  # a view of the first still lives
    del view
    third = pool.empty(*BIG, like=LIKE)
    assert place(third) == where


def test_shape_type_and_alignment_are_those_asked_for():
    pool = Buffers()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tensor = pool.empty(2048, 513, like=torch.empty(0, dtype=dtype))
        assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((2048, 513), dtype, True)
        assert tensor.data_ptr() % 64 == 0
        tensor.fill_(1.5)
        assert float(tensor.double().sum()) == 1.5 * 2048 * 513


def test_small_tensors_are_left_to_torch():
    pool = Buffers()
    assert pool.empty(10, 10, like=LIKE).shape == (10, 10)
    assert pool.kept_bytes == 0


def test_a_slightly_larger_request_finds_room_and_a_much_larger_one_replaces_a_free_block():
    pool = Buffers()
    where = place(pool.empty(*BIG, like=LIKE))
    assert place(pool.empty(ROWS + 30, BIG[1], like=LIKE)) == where
    pool.empty(4 * ROWS, BIG[1], like=LIKE)
    assert 16 << 20 <= pool.kept_bytes < 18 << 20  # the 4 MiB block is gone


def test_release_leaves_a_tensor_in_use_alone():
    pool = Buffers()
    used = pool.empty(*BIG, like=LIKE).fill_(7)
    pool.empty(*BIG, like=LIKE)
    pool.release()
    assert pool.kept_bytes == 0
    others = [pool.empty(*BIG, like=LIKE).fill_(1) for _ in range(3)]
    assert bool((used == 7).all())
    assert len({place(tensor) for tensor in [used, *others]}) == 4


def test_nothing_is_kept_after_a_block_that_failed():
    pool = Buffers()
    with pytest.raises(RuntimeError), pool.kept():
        held = pool.empty(*BIG, like=LIKE)
        assert pool.kept_bytes > 0
        raise RuntimeError(held.shape)
    assert pool.kept_bytes == 0


def test_threads_never_share_a_block():
    pool, wrong = Buffers(), []

    def work(mark):
        for _ in range(200):
            tensor = pool.empty(300, 1 << 10, like=LIKE)
            tensor.fill_(mark)
            if not bool((tensor == mark).all()):
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
