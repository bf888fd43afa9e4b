//! Scales, axes and escaping for plots in SVG. Knows nothing of what is plotted.

use std::fmt::Write;

/// Maps values to positions along one axis.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    from: f64,
    to: f64,
    start: f64,
    end: f64,
    logarithmic: bool,
}

impl Scale {
    /// A linear scale: values `from..to` lie at positions `start..end`.
    #[must_use]
    pub fn linear(from: f64, to: f64, start: f64, end: f64) -> Self {
        Self { from, to: if to > from { to } else { from + 1.0 }, start, end, logarithmic: false }
    }

    /// A logarithmic scale over positive values.
    #[must_use]
    pub fn logarithmic(from: f64, to: f64, start: f64, end: f64) -> Self {
        Self { from: from.ln(), to: to.ln(), start, end, logarithmic: true }
    }

    /// The position of a value, clamped to the axis.
    #[must_use]
    pub fn at(&self, value: f64) -> f64 {
        let value = if self.logarithmic { value.max(f64::MIN_POSITIVE).ln() } else { value };
        let part = ((value - self.from) / (self.to - self.from)).clamp(0.0, 1.0);
        self.start + part * (self.end - self.start)
    }

    /// Whether a value lies on the axis.
    #[must_use]
    pub fn holds(&self, value: f64) -> bool {
        let value = if self.logarithmic { value.max(f64::MIN_POSITIVE).ln() } else { value };
        value >= self.from && value <= self.to
    }

    /// About `count` round values along the axis.
    #[must_use]
    pub fn ticks(&self, count: f64) -> Vec<f64> {
        if self.logarithmic {
            let (low, high) = (self.from.exp().log10().ceil() as i32, self.to.exp().log10().floor() as i32);
            return (low..=high).map(|power| 10_f64.powi(power)).collect();
        }
        let step = round_step((self.to - self.from) / count);
        let first = (self.from / step).ceil() as i64;
        (first..)
            .map(|index| index as f64 * step)
            .take_while(|value| *value <= self.to + step * 1e-6)
            .collect()
    }
}

/// The next larger of 1, 2, 5 times a power of ten.
fn round_step(step: f64) -> f64 {
    let power = 10_f64.powf(step.max(1e-9).log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|factor| factor * power)
        .find(|round| *round >= step)
        .unwrap_or(power)
}

/// A plot's area.
#[derive(Debug, Clone, Copy)]
pub struct Area {
    /// Left edge.
    pub left: f64,
    /// Right edge.
    pub right: f64,
    /// Upper edge.
    pub top: f64,
    /// Lower edge.
    pub bottom: f64,
}

/// Draws horizontal grid lines with their values, and the axis' title above it.
pub fn vertical_axis(svg: &mut String, area: Area, scale: &Scale, title: &str, count: f64) {
    for tick in scale.ticks(count) {
        let y = scale.at(tick);
        let _ = write!(
            svg,
            r#"<line class="grid" x1="{:.1}" x2="{:.1}" y1="{y:.1}" y2="{y:.1}"/><text class="tick" x="{:.1}" y="{:.1}" text-anchor="end">{}</text>"#,
            area.left,
            area.right,
            area.left - 8.0,
            y + 4.0,
            number(tick),
        );
    }
    text(svg, area.left, area.top - 10.0, "axis", title);
}

/// Draws the time axis below a plot, in seconds, with its title.
pub fn time_axis(svg: &mut String, area: Area, scale: &Scale, title: &str) {
    let _ = write!(
        svg,
        r#"<line class="base" x1="{:.1}" x2="{:.1}" y1="{:.1}" y2="{:.1}"/>"#,
        area.left, area.right, area.bottom, area.bottom
    );
    for tick in scale.ticks(9.0) {
        let x = scale.at(tick);
        let _ = write!(
            svg,
            r#"<line class="base" x1="{x:.1}" x2="{x:.1}" y1="{:.1}" y2="{:.1}"/><text class="tick" x="{x:.1}" y="{:.1}" text-anchor="middle">{}</text>"#,
            area.bottom,
            area.bottom + 5.0,
            area.bottom + 19.0,
            number(tick),
        );
    }
    let _ = write!(
        svg,
        r#"<text class="axis" x="{:.1}" y="{:.1}" text-anchor="end">{}</text>"#,
        area.right,
        area.bottom + 38.0,
        escape(title)
    );
}

/// Writes a text at a place.
pub fn text(svg: &mut String, x: f64, y: f64, class: &str, content: &str) {
    let _ = write!(svg, r#"<text class="{class}" x="{x:.1}" y="{y:.1}">{}</text>"#, escape(content));
}

/// Makes a text safe inside HTML and SVG.
#[must_use]
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A number as short as it can be: thousands with a thin space, at most three decimals.
#[must_use]
pub fn number(value: f64) -> String {
    let text = format!("{value:.3}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    let (whole, rest) =
        text.split_once('.').map_or((text, String::new()), |(whole, rest)| (whole, format!(".{rest}")));
    let (sign, digits) = whole.strip_prefix('-').map_or(("", whole), |digits| ("−", digits));
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push('\u{202f}');
        }
        grouped.push(digit);
    }
    format!("{sign}{grouped}{rest}")
}

/// A duration with a fitting unit.
#[must_use]
pub fn duration(ms: f64) -> String {
    if ms < 10.0 {
        return format!("{ms:.1} ms");
    }
    if ms < 1000.0 {
        return format!("{ms:.0} ms");
    }
    if ms < 60_000.0 {
        return format!("{:.2} s", ms / 1000.0);
    }
    format!("{:.0} min {:.0} s", (ms / 60_000.0).floor(), (ms % 60_000.0) / 1000.0)
}

/// An amount of bytes with a fitting unit.
#[must_use]
pub fn bytes(amount: u64) -> String {
    let value = amount as f64;
    match amount {
        0..1024 => format!("{amount} B"),
        1024..0x10_0000 => format!("{:.1} KiB", value / 1024.0),
        0x10_0000..0x4000_0000 => format!("{:.1} MiB", value / f64::from(1 << 20)),
        _ => format!("{:.2} GiB", value / f64::from(1 << 30)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_durations_and_amounts_read_well() {
        assert_eq!(number(1_234_567.5), "1\u{202f}234\u{202f}567.5");
        assert_eq!(number(0.0), "0");
        assert_eq!(duration(83_000.0), "1 min 23 s");
        assert_eq!(duration(4.21), "4.2 ms");
        assert_eq!(bytes(3 << 20), "3.0 MiB");
    }

    #[test]
    fn scales_clamp_and_give_round_ticks() {
        let scale = Scale::linear(0.0, 95.0, 0.0, 100.0);
        assert_eq!(scale.ticks(5.0), [0.0, 20.0, 40.0, 60.0, 80.0]);
        assert!((scale.at(500.0) - 100.0).abs() < 1e-9);
        let scale = Scale::logarithmic(1.0, 2000.0, 0.0, 100.0);
        assert_eq!(scale.ticks(5.0), [1.0, 10.0, 100.0, 1000.0]);
        assert!(!scale.holds(0.5));
    }
}
