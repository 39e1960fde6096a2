//! Keys that are spread over the whole range, as digests and those of clients are, and of which
//! none comes twice.

/// The key of this number, of those that one caller uses in one burst.
pub fn key(burst: u32, caller: usize, number: u32) -> [u8; 32] {
    let seed = u64::from(burst) << 44 | (caller as u64) << 32 | u64::from(number);
    let mut key = [0; 32];
    for (part, bytes) in (0..).zip(key.chunks_exact_mut(8)) {
        bytes.copy_from_slice(&mixed(seed ^ part << 62).to_le_bytes());
    }
    key
}

/// Mixes bits without losing any (SplitMix64).
fn mixed(mut bits: u64) -> u64 {
    bits = bits.wrapping_add(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_key_comes_twice() {
        let numbers =
            (0..4).flat_map(|b| (0..64).flat_map(move |c| (0..100).map(move |n| (b, c, n))));
        let keys: HashSet<_> = numbers.map(|(b, c, n)| key(b, c, n)[..8].to_vec()).collect();
        assert_eq!(keys.len(), 4 * 64 * 100);
    }
}
