//! Medians, quartiles and ratios, and what they say of a goal.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The median of some figures and the quartiles beside it.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct Quartiles {
    /// A quarter of the figures is below this.
    pub q1: f64,
    /// Half of them are.
    pub median: f64,
    /// Three quarters are.
    pub q3: f64,
}

impl Quartiles {
    /// Of these figures, between which is interpolated; `None` of none.
    pub fn of(figures: &[f64]) -> Option<Self> {
        let mut sorted = figures.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let position = share * (sorted.len().checked_sub(1)? as f64);
            let (below, above) = (position.floor() as usize, position.ceil() as usize);
            Some(sorted[below] + (sorted[above] - sorted[below]) * position.fract())
        };
        Some(Self { q1: at(0.25)?, median: at(0.5)?, q3: at(0.75)? })
    }
}

impl fmt::Display for Quartiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { q1, median, q3 } = *self;
        write!(f, "{} [{}–{}]", short(median), short(q1), short(q3))
    }
}

/// A figure, which is not negative, with as many digits as tell two of them apart.
pub fn short(figure: f64) -> String {
    match figure {
        size if size >= 99.95 => counted(size.round() as u64),
        size if size >= 9.995 => format!("{figure:.1}"),
        _ => format!("{figure:.2}"),
    }
}

/// A number with its thousands apart.
pub fn counted(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// Round by round, one figure divided by another.
pub fn ratios(figures: &[f64], references: &[f64]) -> Vec<f64> {
    figures.iter().zip(references).map(|(figure, reference)| figure / reference).collect()
}

/// What a figure should be.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// No less.
    AtLeast(f64),
    /// No more.
    AtMost(f64),
}

impl Bound {
    /// What the quartiles say of it.
    pub fn judge(self, quartiles: &Quartiles) -> Verdict {
        let Quartiles { q1, q3, .. } = *quartiles;
        let (worst_is_good, best_is_bad) = match self {
            Self::AtLeast(bound) => (q1 >= bound, q3 < bound),
            Self::AtMost(bound) => (q3 <= bound, q1 > bound),
        };
        match (worst_is_good, best_is_bad) {
            (true, _) => Verdict::Reached,
            (_, true) => Verdict::Missed,
            _ => Verdict::Undecided,
        }
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(bound) => write!(f, "≥ {bound}"),
            Self::AtMost(bound) => write!(f, "≤ {bound}"),
        }
    }
}

/// Whether a goal was reached.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Both quartiles are on its good side.
    Reached,
    /// Both are on its bad side.
    Missed,
    /// They are astride.
    Undecided,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Reached => "reached",
            Self::Missed => "missed",
            Self::Undecided => "undecided",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_are_interpolated() {
        let quartiles = Quartiles::of(&[4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!(quartiles, Quartiles { q1: 1.75, median: 2.5, q3: 3.25 });
        let one = Quartiles::of(&[7.0]).unwrap();
        assert_eq!(one, Quartiles { q1: 7.0, median: 7.0, q3: 7.0 });
        assert_eq!(Quartiles::of(&[]), None);
    }

    #[test]
    fn a_goal_is_judged_by_both_quartiles() {
        let quartiles = Quartiles { q1: 0.9, median: 0.95, q3: 1.1 };
        assert_eq!(Bound::AtLeast(0.9).judge(&quartiles), Verdict::Reached);
        assert_eq!(Bound::AtLeast(1.0).judge(&quartiles), Verdict::Undecided);
        assert_eq!(Bound::AtLeast(1.2).judge(&quartiles), Verdict::Missed);
        assert_eq!(Bound::AtMost(1.1).judge(&quartiles), Verdict::Reached);
        assert_eq!(Bound::AtMost(1.0).judge(&quartiles), Verdict::Undecided);
        assert_eq!(Bound::AtMost(0.8).judge(&quartiles), Verdict::Missed);
    }

    #[test]
    fn figures_are_short() {
        let shown = [0.123, 12.34, 123.4, 1_234_567.0].map(short);
        assert_eq!(shown, ["0.12", "12.3", "123", "1,234,567"]);
    }
}
