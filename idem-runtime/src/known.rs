//! What is found out once and found again: lists that only grow, so that nobody waits for a lock.

use std::sync::OnceLock;

/// A list that only grows. It is gone through from its beginning, so it is for a handful.
#[derive(Debug)]
pub(crate) struct Known<T>(OnceLock<Box<(T, Known<T>)>>);

impl<T> Default for Known<T> {
    fn default() -> Self {
        Self(OnceLock::new())
    }
}

impl<T> Known<T> {
    /// What is looked for, and its place; where it is not known yet, it is made and known from now
    /// on, unless there are as many as this already.
    pub(crate) fn find(
        &self,
        most: usize,
        is_it: impl Fn(&T) -> bool,
        make: impl Fn() -> T,
    ) -> Option<(usize, &T)> {
        let mut rest = self;
        for place in 0..most {
            let (known, others) = &**rest.0.get_or_init(|| Box::new((make(), Self::default())));
            if is_it(known) {
                return Some((place, known));
            }
            rest = others;
        }
        None
    }

    /// What has a place.
    pub(crate) fn get(&self, place: usize) -> Option<&T> {
        let mut node = self.0.get()?;
        for _ in 0..place {
            node = node.1.0.get()?;
        }
        Some(&node.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_known_once_and_keeps_its_place() {
        let list = Known::default();
        let find = |number: u32| list.find(3, |known| *known == number, || number);
        for _ in 0..2 {
            assert_eq!(find(7), Some((0, &7)));
            assert_eq!(find(8), Some((1, &8)));
            assert_eq!(find(9), Some((2, &9)));
            assert_eq!(find(10), None, "there is no room");
        }
        assert_eq!(
            (0..4).map(|place| list.get(place)).collect::<Vec<_>>(),
            [Some(&7), Some(&8), Some(&9), None]
        );
    }

    #[test]
    fn however_many_look_at_once_each_is_known_once() {
        let list = Known::default();
        let look = || {
            let found = (0..100).map(|n| list.find(100, |known| *known == n, || n).unwrap().0);
            found.collect::<Vec<_>>()
        };
        let places = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(look)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        assert!(places.iter().all(|others| *others == places[0]));
        assert_eq!(list.get(100), None);
    }
}
