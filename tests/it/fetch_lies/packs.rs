//! Packs that lie about their sizes, their bases and themselves.

use super::*;

/// A pack around these entries, with a proper checksum.
pub(super) fn pack(count: u32, entries: &[u8]) -> Vec<u8> {
    let mut out = b"PACK\0\0\0\x02".to_vec();
    out.extend(count.to_be_bytes());
    out.extend(entries);
    let mut hasher = gix::hash::hasher(gix::hash::Kind::Sha1);
    hasher.update(&out);
    out.extend(hasher.try_finalize().unwrap().as_slice());
    out
}

pub(super) fn entry(kind: u8, size: u64, base: &[u8], content: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = size >> 4;
    let mut byte = kind << 4 | (size & 0x0f) as u8;
    while rest > 0 {
        out.push(byte | 0x80);
        byte = (rest & 0x7f) as u8;
        rest >>= 7;
    }
    out.push(byte);
    out.extend(base);
    let mut deflated = flate2::write::ZlibEncoder::new(out, flate2::Compression::best());
    deflated.write_all(content).unwrap();
    deflated.finish().unwrap()
}

#[test]
fn hostile_packs_are_refused_with_the_reason() {
    let blob = entry(3, 5, b"", b"hello");
    let zeros = vec![0; 3_000_000];
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        (
            "no pack at all",
            b"JUNKJUNKJUNKJUNK".to_vec(),
            "does not begin as a pack",
        ),
        ("empty", Vec::new(), "ends before"),
        (
            "unknown version",
            b"PACK\0\0\0\x09\0\0\0\x01".to_vec(),
            "does not begin as a pack",
        ),
        ("fewer objects than said", pack(3, &blob), ""),
        (
            "more objects than said",
            pack(1, &[blob.clone(), blob.clone()].concat()),
            "bytes follow its end",
        ),
        (
            "wrong checksum",
            {
                let mut p = pack(1, &blob);
                *p.last_mut().unwrap() ^= 1;
                p
            },
            "checksum",
        ),
        (
            "type 0",
            pack(1, &entry(0, 5, b"", b"hello")),
            "unknown type 0",
        ),
        (
            "type 5",
            pack(1, &entry(5, 5, b"", b"hello")),
            "unknown type 5",
        ),
        (
            "larger than said",
            pack(1, &entry(3, 4, b"", b"hello")),
            "larger than it says",
        ),
        (
            "smaller than said",
            pack(1, &entry(3, 6, b"", b"hello")),
            "smaller than it says",
        ),
        (
            "zeros behind a small size",
            pack(1, &entry(3, 10, b"", &zeros)),
            "larger than it says",
        ),
        (
            "huge declared size",
            pack(1, &entry(3, 1 << 50, b"", b"x")),
            "CLONE_MAX_OBJECT_SIZE",
        ),
        (
            "endless size",
            pack(1, &[&[0xb0][..], &[0xff; 12]].concat()),
            "has no end",
        ),
        (
            "not deflated",
            pack(
                1,
                &[
                    0x35, b'h', b'e', b'l', b'l', b'o', b'h', b'e', b'l', b'l', b'o',
                ],
            ),
            "cannot be inflated",
        ),
        (
            "base before the pack",
            pack(1, &entry(6, 4, &[0x7f], b"\x05\x01\x01x")),
            "outside of the pack",
        ),
        (
            "base is itself",
            pack(1, &entry(6, 4, &[0], b"\x05\x01\x01x")),
            "outside of the pack",
        ),
        (
            "base distance overflows",
            pack(
                1,
                &entry(
                    6,
                    4,
                    &[
                        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f,
                    ],
                    b"\x05\x01\x01x",
                ),
            ),
            "outside of the pack",
        ),
        (
            "base between two objects",
            pack(
                2,
                &[
                    blob.clone(),
                    entry(6, 4, &[(blob.len() - 1) as u8], b"\x05\x01\x01x"),
                ]
                .concat(),
            ),
            "resolving its deltas",
        ),
        (
            "delta for another base size",
            pack(
                2,
                &[
                    blob.clone(),
                    entry(6, 4, &[blob.len() as u8], b"\x06\x01\x01x"),
                ]
                .concat(),
            ),
            "resolving its deltas",
        ),
        (
            "delta copies beyond its base",
            pack(
                2,
                &[
                    blob.clone(),
                    entry(6, 5, &[blob.len() as u8], b"\x05\x05\x91\x03\x05"),
                ]
                .concat(),
            ),
            "resolving its deltas",
        ),
        (
            "delta result bomb",
            pack(
                2,
                &[
                    blob.clone(),
                    entry(6, 8, &[blob.len() as u8], b"\x05\xff\xff\xff\xff\x7f\x01x"),
                ]
                .concat(),
            ),
            "CLONE_MAX_OBJECT_SIZE",
        ),
        (
            "delta with opcode 0",
            pack(
                2,
                &[
                    blob.clone(),
                    entry(6, 3, &[blob.len() as u8], b"\x05\x01\x00"),
                ]
                .concat(),
            ),
            "resolving its deltas",
        ),
        (
            "delta without sizes",
            pack(
                2,
                &[blob.clone(), entry(6, 1, &[blob.len() as u8], b"\x85")].concat(),
            ),
            "has no sizes",
        ),
        (
            "base by name that is not there",
            pack(1, &entry(7, 4, &[7; 20], b"\x05\x01\x01x")),
            "resolving its deltas",
        ),
        ("without the commit", pack(1, &blob), "is not in it"),
        ("no objects", pack(0, b""), "is not in it"),
    ];
    for (name, bytes, expected) in cases {
        let error = error_of(&honest_until_the_pack(as_pack(&bytes)));
        assert!(error.to_string().contains(expected), "{name}: {error}");
        assert!(
            matches!(error, Error::Pack { .. } | Error::TooLarge { .. }),
            "{name}: {error:?}"
        );
    }
}

#[test]
fn bit_flips_and_truncations_of_a_pack_never_panic() {
    let base: Vec<u8> = (0..200_u8).collect();
    let blob = entry(3, 200, b"", &base);
    let delta = entry(
        6,
        7,
        &[blob.len() as u8 & 0x7f],
        b"\xc8\x01\x03\x91\x00\x03\x00",
    );
    let good = pack(2, &[blob, delta].concat());
    let answer = Arc::new(Mutex::new(Vec::new()));
    let served = Arc::clone(&answer);
    let liar = Liar::start(move |head, stream| {
        if head.starts_with("GET") {
            ok(stream, ADVERTISEMENT, &hello());
        } else if head.contains("command=ls-refs") {
            ok(stream, RESULT, &refs());
        } else {
            let body = served.lock().unwrap().clone();
            ok(stream, RESULT, &body);
        }
    });
    for at in (0..good.len()).step_by(5) {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        *answer.lock().unwrap() = as_pack(&bad);
        error_of(&liar);
        *answer.lock().unwrap() = as_pack(&good[..at]);
        error_of(&liar);
    }
}
