//! Plots of ratios, as SVG.

use std::fmt::Write as _;

use crate::statistics::Quartiles;

/// One of the plots that stand side by side: in each group, a point for each series.
#[derive(Clone, Debug)]
pub struct Panel {
    /// What it shows.
    pub title: String,
    /// What the groups differ in.
    pub axis: String,
    /// The names of the groups, from left to right.
    pub groups: Vec<String>,
    /// What is compared.
    pub series: Vec<Series>,
}

/// The points of one colour.
#[derive(Clone, Debug)]
pub struct Series {
    /// What it is called.
    pub name: String,
    /// One for each group, with its quartiles; `None` where nothing was measured.
    pub points: Vec<Option<Quartiles>>,
}

/// Colours that people who see few of them tell apart, too (Okabe and Ito), and a grey.
const COLOURS: [&str; 8] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#888888"];
/// What tells the second eight from the first.
const SHAPES: usize = 2;
const WIDTH: f64 = 460.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 52.0;
const TOP: f64 = 74.0;
const GAP: f64 = 70.0;

/// Draws panels beside each other, on logarithmic scales with a line at 1.
pub fn svg(title: &str, note: &str, panels: &[Panel]) -> String {
    let panels: Vec<_> = panels.iter().filter(|panel| !panel.groups.is_empty()).collect();
    let mut names: Vec<&str> = Vec::new();
    for series in panels.iter().flat_map(|panel| &panel.series) {
        if !names.contains(&&*series.name) {
            names.push(&series.name);
        }
    }
    let columns = 4;
    let rows = names.len().div_ceil(columns);
    let width = LEFT + panels.len() as f64 * (WIDTH + GAP) - GAP + 20.0;
    let width = width.max(760.0);
    let height = TOP + HEIGHT + 76.0 + 20.0 * rows as f64 + 24.0;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    text(&mut out, LEFT - 36.0, 24.0, "font-size=\"16\" font-weight=\"bold\"", title);
    for (index, panel) in panels.iter().enumerate() {
        draw(&mut out, panel, LEFT + index as f64 * (WIDTH + GAP), &names);
    }
    let legend = TOP + HEIGHT + 70.0;
    let step = (width - LEFT) / columns as f64;
    for (index, name) in names.iter().enumerate() {
        let x = LEFT - 30.0 + step * (index % columns) as f64;
        let y = legend + 20.0 * (index / columns) as f64;
        mark(&mut out, x, y - 4.0, index);
        text(&mut out, x + 12.0, y, "", name);
    }
    let y = height - 12.0;
    text(&mut out, LEFT - 36.0, y, "fill=\"#666\" font-size=\"11\"", note);
    out + "</svg>\n"
}

fn draw(out: &mut String, panel: &Panel, left: f64, names: &[&str]) {
    let points = panel.series.iter().flat_map(|series| series.points.iter().flatten());
    let (low, high) =
        points.fold((0.9f64, 1.1f64), |(low, high), it| (low.min(it.q1), high.max(it.q3)));
    let (low, high) = ((low * 0.93).ln(), (high * 1.07).ln());
    let y_of = |ratio: f64| TOP + HEIGHT * (high - ratio.ln()) / (high - low);
    text(out, left, TOP - 16.0, "font-weight=\"bold\"", &panel.title);
    for tick in ticks(low.exp(), high.exp()) {
        let (y, one) = (y_of(tick), tick == 1.0);
        let stroke = if one { "#444" } else { "#ddd" };
        let _ = writeln!(
            out,
            "<line x1=\"{left}\" x2=\"{}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"{stroke}\"/>",
            left + WIDTH
        );
        let label = tick.to_string();
        text(out, left - 6.0, y + 4.0, "text-anchor=\"end\" fill=\"#444\"", &label);
    }
    let group_width = WIDTH / panel.groups.len() as f64;
    for (index, group) in panel.groups.iter().enumerate() {
        let x = left + group_width * (index as f64 + 0.5);
        text(out, x, TOP + HEIGHT + 18.0, "text-anchor=\"middle\"", group);
        if index > 0 {
            let x = left + group_width * index as f64;
            let _ = writeln!(
                out,
                "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP}\" y2=\"{}\" stroke=\"#eee\"/>",
                TOP + HEIGHT
            );
        }
    }
    let middle = left + WIDTH / 2.0;
    text(out, middle, TOP + HEIGHT + 36.0, "text-anchor=\"middle\" fill=\"#444\"", &panel.axis);
    let count = panel.series.len() as f64;
    for (position, series) in panel.series.iter().enumerate() {
        let look = names.iter().position(|name| *name == series.name).unwrap_or_default();
        let colour = COLOURS[look % COLOURS.len()];
        for (index, point) in series.points.iter().enumerate() {
            let Some(Quartiles { q1, median, q3 }) = point else { continue };
            let share = 0.12 + 0.76 * (position as f64 + 0.5) / count;
            let x = left + group_width * (index as f64 + share);
            let _ = writeln!(
                out,
                "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{:.1}\" y2=\"{:.1}\" stroke=\"{colour}\" \
                 stroke-width=\"1.5\"/>",
                y_of(*q1),
                y_of(*q3)
            );
            mark(out, x, y_of(*median), look);
        }
    }
}

/// A point in the look of a series.
fn mark(out: &mut String, x: f64, y: f64, look: usize) {
    let colour = COLOURS[look % COLOURS.len()];
    let _ = match (look / COLOURS.len()) % SHAPES {
        0 => writeln!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{colour}\"/>"),
        _ => writeln!(
            out,
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"8\" height=\"8\" fill=\"white\" \
             stroke=\"{colour}\" stroke-width=\"2\"/>",
            x - 4.0,
            y - 4.0
        ),
    };
}

/// Round numbers of a logarithmic scale.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let decades = (low.log10().floor() as i32)..=(high.log10().ceil() as i32);
    let all = |steps: &'static [f64]| {
        let decades = decades.clone().flat_map(|decade| {
            // Exact ones above 1, since 10 to a power is.
            let scale = 10f64.powi(decade.abs());
            steps.iter().map(move |step| if decade < 0 { step / scale } else { step * scale })
        });
        decades.filter(|tick| (low..=high).contains(tick)).collect::<Vec<_>>()
    };
    let fine = all(&[1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]);
    if fine.len() <= 10 {
        return fine;
    }
    all(&[1.0, 2.0, 5.0])
}

fn text(out: &mut String, x: f64, y: f64, attributes: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" {attributes}>{text}</text>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_within() {
        assert_eq!(ticks(0.45, 2.1), [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0]);
        assert_eq!(ticks(0.09, 12.0), [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]);
    }

    #[test]
    fn a_point_is_drawn_for_each_measurement() {
        let point = Quartiles { q1: 0.8, median: 0.9, q3: 1.0 };
        let series = |name: &str, points| Series { name: name.to_owned(), points };
        let panel = Panel {
            title: "first < replay".to_owned(),
            axis: "connections".to_owned(),
            groups: vec!["1".to_owned(), "64".to_owned()],
            series: vec![
                series("one", vec![Some(point), Some(point)]),
                series("other", vec![None, Some(point)]),
            ],
        };
        let drawn = svg("A test", "", &[panel]);
        // Three of measurements, two of the legend.
        assert_eq!(drawn.matches("<circle").count(), 5);
        assert!(drawn.contains("first &lt; replay"));
    }
}
