//! The oracle must accept every instant and nothing else.

use super::super::oracle::{Op, Replay, SECTOR, Stream};
use super::PointInTime;

/// Two disks, the second of an odd size, small enough that writes overlap a lot.
fn stream() -> Stream {
    Stream { seed: 42, threads: 3, zero: 20, disks: vec![8 << 20, (4 << 20) + 5 * 512 + 100] }
}

/// The disks when the threads have done so many writes.
fn images(numbers: &[u64]) -> Vec<Vec<u8>> {
    let mut replay = Replay::new(&stream());
    replay.advance_all(numbers);
    vec![replay.bytes(0), replay.bytes(1)]
}

/// Does a write, or only a part of its sectors.
fn write(images: &mut [Vec<u8>], op: &Op, sectors: impl Fn(usize) -> bool) {
    let mut filled = [0; SECTOR];
    for (position, sector) in op.sectors().enumerate() {
        if sectors(position) {
            op.fill((sector * SECTOR) as u64, &mut filled);
            images[op.disk][sector * SECTOR..][..SECTOR].copy_from_slice(&filled);
        }
    }
}

/// The last data write before or at `number` on `disk` that is longer than one sector.
fn data_write(thread: u32, number: u64, disk: usize) -> Op {
    let ops = (1..=number).rev().map(|n| stream().op(thread, n));
    ops.into_iter().find(|op| !op.zero && op.disk == disk && op.length > 512).expect("one in a few")
}

#[test]
fn finds_every_instant() {
    for n in (0..40).chain(500..540) {
        let numbers = [n, n * 2 + 1, 700 - n];
        let found = PointInTime::find(&images(&numbers), &stream()).unwrap();
        for (cut, number) in found.threads.iter().zip(numbers) {
            assert!(!cut.torn && (cut.number..=cut.latest).contains(&number), "{cut:?} for {number}");
        }
    }
}

#[test]
fn continues_from_an_earlier_instant_and_over_content() {
    let base = vec![vec![7; 8 << 20], vec![9; (4 << 20) + 5 * 512 + 100]];
    let mut replay = Replay::over(&stream(), base);
    replay.advance_all(&[100, 100, 100]);
    let mut later = replay.clone();
    later.advance_all(&[150, 100, 300]);
    let images = [later.bytes(0), later.bytes(1)];
    let found = PointInTime::find_after(&images, &replay).unwrap();
    found.assert_between(&[150, 100, 300], &[150, 100, 300]);
    PointInTime::find(&images, &stream()).expect_err("the content from before is not zeros");
}

#[test]
fn one_missing_sector_is_a_violation() {
    let mut images = images(&[300, 300, 300]);
    let op = data_write(1, 290, 0);
    let sector = op.sectors().start;
    let old = {
        let mut replay = Replay::new(&stream());
        replay.advance(1, op.number - 1);
        replay.bytes(0)
    };
    let range = sector * SECTOR..(sector + 1) * SECTOR;
    images[0][range.clone()].copy_from_slice(&old[range]);
    let error = PointInTime::find(&images, &stream()).unwrap_err();
    assert!(error.contains("order/completeness violation"), "{error}");
    assert!(error.contains("disk 0") && error.contains("thread 1"), "{error}");
}

#[test]
fn a_newer_write_on_one_disk_without_the_earlier_on_the_other_is_a_violation() {
    // Disk 0 was cut a few writes before disk 1.
    let (early, late) = (images(&[300, 300, 300]), images(&[320, 300, 300]));
    let error = PointInTime::find(&[&early[0], &late[1]], &stream()).unwrap_err();
    assert!(error.contains("order/completeness violation") && error.contains("thread 0"), "{error}");
    let error = PointInTime::find(&[&late[0], &early[1]], &stream()).unwrap_err();
    assert!(error.contains("order/completeness violation") && error.contains("disk 1"), "{error}");
}

#[test]
fn swapped_content_is_corruption() {
    let mut images = images(&[300, 300, 300]);
    let op = data_write(0, 300, 0);
    let (a, b) = (op.sectors().start * SECTOR, (op.sectors().start + 1) * SECTOR);
    for i in 0..SECTOR {
        images[0].swap(a + i, b + i);
    }
    let error = PointInTime::find(&images, &stream()).unwrap_err();
    assert!(error.contains("corruption"), "{error}");
}

#[test]
fn one_flipped_bit_anywhere_is_a_violation() {
    for at in [0, 511, 12_345, (8 << 20) - 1] {
        let mut images = images(&[300, 300, 300]);
        images[0][at] ^= 1;
        PointInTime::find(&images, &stream()).unwrap_err();
    }
    let mut images = images(&[10, 10, 10]);
    *images[1].last_mut().unwrap() = 1;
    let error = PointInTime::find(&images, &stream()).unwrap_err();
    assert!(error.contains("after the last sector"), "{error}");
}

#[test]
fn the_next_write_may_be_torn_but_no_other() {
    let next = data_write(2, 300, 0);
    let done = [300, 300, next.number - 1];
    let mut torn = images(&done);
    write(&mut torn, &next, |position| position == 0);
    let found = PointInTime::find(&torn, &stream()).unwrap();
    assert!(found.torn() && found.threads[2].torn, "{found:?}");
    assert_eq!(found.threads[2].number, next.number - 1);

    // The write after the next one is there in part, the next one is not at all.
    let mut skipped = images(&[300, 300, next.number - 2]);
    write(&mut skipped, &next, |position| position == 0);
    PointInTime::find(&skipped, &stream()).unwrap_err();
}

#[test]
fn a_torn_zeroing_write_is_recognised() {
    let content = Replay::over(&stream(), vec![vec![7; 8 << 20], vec![7; (4 << 20) + 5 * 512 + 100]]);
    let next = (1..100).map(|n| stream().op(0, n)).find(|op| op.zero && op.length > 512).unwrap();
    let mut model = content.clone();
    model.advance(0, next.number - 1);
    let mut torn = vec![model.bytes(0), model.bytes(1)];
    write(&mut torn, &next, |position| position == 0);
    let found = PointInTime::find_after(&torn, &content).unwrap();
    assert_eq!((found.threads[0].number, found.threads[0].torn), (next.number - 1, true));
}
