//! The local wall clock, for dates in file names.
//!
//! The standard library knows no time zones and the C library's `localtime`
//! needs `unsafe`, so the zone's own file is read: TZif (RFC 9636), named by
//! `TZ` or at `/etc/localtime`. Instants after the last recorded transition
//! follow the rule in its footer (POSIX `TZ`, month-week-day form). Whatever
//! cannot be read means UTC.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// A wall clock time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalTime {
    /// Year.
    pub year: i64,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
    /// 0 to 23.
    pub hour: u8,
    /// 0 to 59.
    pub minute: u8,
    /// 0 to 59.
    pub second: u8,
}

impl LocalTime {
    /// The time now in the machine's time zone.
    pub fn now() -> Self {
        Self::at(SystemTime::now())
    }

    /// A time in the machine's time zone.
    pub fn at(time: SystemTime) -> Self {
        let utc = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
        let offset =
            zone_file().and_then(|path| std::fs::read(path).ok()).and_then(|data| offset_at(&data, utc));
        Self::from_seconds(utc + offset.unwrap_or(0))
    }

    /// A time in the machine's time zone as `2026-03-07T04:05:59.000123`.
    pub fn iso(time: SystemTime) -> String {
        let Self { year, month, day, hour, minute, second } = Self::at(time);
        let micros = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.subsec_micros());
        format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}")
    }

    /// The time `seconds` after the start of 1970.
    fn from_seconds(seconds: i64) -> Self {
        let (days, second_of_day) = (seconds.div_euclid(DAY), seconds.rem_euclid(DAY));
        let (year, month, day) = date_of(days);
        let part = |unit: i64, modulus: i64| (second_of_day / unit % modulus) as u8;
        Self { year, month, day, hour: part(3600, 24), minute: part(60, 60), second: part(1, 60) }
    }
}

const DAY: i64 = 86_400;
/// Days in 400 years of the Gregorian calendar.
const ERA: i64 = 146_097;

/// Days since 1970 → year, month, day. Years are counted from 1 March, so
/// that the leap day comes last (H. Hinnant's day-count algorithms).
fn date_of(days: i64) -> (i64, u8, u8) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(ERA), shifted.rem_euclid(ERA));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month as u8, day as u8)
}

/// Year, month, day → days since 1970.
fn days_of(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let march_month = (month + 9) % 12;
    let day_of_year = (153 * march_month + 2) / 5 + day - 1;
    era * ERA + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

fn zone_file() -> Option<PathBuf> {
    let default = PathBuf::from("/etc/localtime");
    let Ok(zone) = std::env::var("TZ") else { return Some(default) };
    let name = zone.strip_prefix(':').unwrap_or(&zone);
    if name.is_empty() {
        return None;
    }
    let path = Path::new("/usr/share/zoneinfo").join(name);
    path.is_file().then_some(path)
}

/// Big-endian fields of a TZif file, read front to back.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(count)?;
        self.0 = tail;
        Some(head)
    }

    fn count(&mut self) -> Option<usize> {
        Some(u32::from_be_bytes(self.take(4)?.try_into().ok()?) as usize)
    }
}

/// Number of bytes of a data block with 4- or 8-byte times, and its counts.
struct Header {
    transitions: usize,
    types: usize,
    bytes: usize,
}

fn header(fields: &mut Fields<'_>, time_bytes: usize) -> Option<Header> {
    if fields.take(5)?.get(..4)? != b"TZif" {
        return None;
    }
    fields.take(15)?;
    let is_ut = fields.count()?;
    let is_std = fields.count()?;
    let leaps = fields.count()?;
    let transitions = fields.count()?;
    let types = fields.count()?;
    let letters = fields.count()?;
    let bytes = transitions.checked_mul(time_bytes + 1)?.checked_add(types.checked_mul(6)?)?;
    let bytes = bytes.checked_add(letters)?.checked_add(leaps.checked_mul(time_bytes + 4)?)?;
    Some(Header { transitions, types, bytes: bytes.checked_add(is_std)?.checked_add(is_ut)? })
}

/// Seconds east of UTC at an instant, by a TZif file of version 2 or later.
fn offset_at(data: &[u8], utc: i64) -> Option<i64> {
    let mut fields = Fields(data);
    let old = header(&mut fields, 4)?;
    fields.take(old.bytes)?;
    let new = header(&mut fields, 8)?;
    let mut block = Fields(fields.take(new.bytes)?);
    let times = block.take(new.transitions * 8)?.chunks_exact(8);
    let passed =
        times.filter_map(|t| t.try_into().ok()).take_while(|t| i64::from_be_bytes(*t) <= utc).count();
    let indices = block.take(new.transitions)?;
    let types = block.take(new.types * 6)?;
    let footer = std::str::from_utf8(fields.0).ok()?.trim_matches('\n');
    if passed == new.transitions
        && let Some(offset) = Rule::parse(footer).map(|rule| rule.offset_at(utc))
    {
        return Some(offset);
    }
    let index = passed.checked_sub(1).and_then(|i| indices.get(i)).copied().unwrap_or(0);
    let kind = types.get(usize::from(index) * 6..)?.get(..4)?;
    Some(i64::from(i32::from_be_bytes(kind.try_into().ok()?)))
}

/// A POSIX zone: standard offset, and summer time between two dates.
struct Rule {
    standard: i64,
    summer: Option<(i64, Switch, Switch)>,
}

/// "The `week`-th `weekday` of `month`" at `seconds` after midnight; week 5 is the last.
struct Switch {
    month: i64,
    week: i64,
    weekday: i64,
    seconds: i64,
}

impl Rule {
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(',');
        let rest = skip_name(parts.next()?)?;
        let end = rest.find(|c: char| !matches!(c, '0'..='9' | '+' | '-' | ':')).unwrap_or(rest.len());
        let (offset, summer_name) = rest.split_at(end);
        let standard = -clock(offset)?;
        if summer_name.is_empty() {
            return Some(Self { standard, summer: None });
        }
        let offset = skip_name(summer_name)?;
        let summer = if offset.is_empty() { standard + 3600 } else { -clock(offset)? };
        let (start, end) = (Switch::parse(parts.next()?)?, Switch::parse(parts.next()?)?);
        Some(Self { standard, summer: Some((summer, start, end)) })
    }

    fn offset_at(&self, utc: i64) -> i64 {
        let Some((summer, start, end)) = &self.summer else { return self.standard };
        let year = date_of((utc + self.standard).div_euclid(DAY)).0;
        let from = start.local(year) - self.standard;
        let to = end.local(year) - summer;
        let is_summer = if from <= to { (from..to).contains(&utc) } else { !(to..from).contains(&utc) };
        if is_summer { *summer } else { self.standard }
    }
}

impl Switch {
    fn parse(text: &str) -> Option<Self> {
        let (date, time) = text.split_once('/').unwrap_or((text, "2"));
        let mut numbers = date.strip_prefix('M')?.split('.').map(|n| n.parse::<i64>().ok());
        let (month, week, weekday) = (numbers.next()??, numbers.next()??, numbers.next()??);
        let is_valid = (1..=12).contains(&month) && (1..=5).contains(&week) && (0..=6).contains(&weekday);
        is_valid.then_some(Self { month, week, weekday, seconds: clock(time)? })
    }

    /// Seconds since 1970 on the local clock.
    fn local(&self, year: i64) -> i64 {
        let first = days_of(year, self.month, 1);
        // 1 January 1970 was a Thursday.
        let first_weekday = (first + 4).rem_euclid(7);
        let mut day = first + (self.weekday - first_weekday).rem_euclid(7) + (self.week - 1) * 7;
        let next = if self.month == 12 { days_of(year + 1, 1, 1) } else { days_of(year, self.month + 1, 1) };
        if day >= next {
            day -= 7;
        }
        day * DAY + self.seconds
    }
}

/// Skips a zone's short name, `CET` or `<+0330>`.
fn skip_name(text: &str) -> Option<&str> {
    if let Some(quoted) = text.strip_prefix('<') {
        return quoted.split_once('>').map(|(_, rest)| rest);
    }
    let rest = text.trim_start_matches(|c: char| c.is_ascii_alphabetic());
    (rest.len() < text.len()).then_some(rest)
}

/// `[+-]h[:m[:s]]` in seconds.
fn clock(text: &str) -> Option<i64> {
    let (sign, digits) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    let mut total = 0;
    for (part, unit) in digits.split(':').zip([3600, 60, 1]) {
        total += part.parse::<i64>().ok().filter(|n| (0..=167).contains(n))? * unit;
    }
    Some(sign * total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calendar() {
        let at = |s| {
            let t = LocalTime::from_seconds(s);
            (t.year, t.month, t.day, t.hour, t.minute, t.second)
        };
        assert_eq!(at(0), (1970, 1, 1, 0, 0, 0));
        assert_eq!(at(951_782_399), (2000, 2, 28, 23, 59, 59));
        assert_eq!(at(951_782_400), (2000, 2, 29, 0, 0, 0));
        assert_eq!(at(1_709_251_199), (2024, 2, 29, 23, 59, 59));
        assert_eq!(at(-1), (1969, 12, 31, 23, 59, 59));
        for days in (-200_000..200_000).step_by(37) {
            let (y, m, d) = date_of(days);
            assert_eq!(days_of(y, i64::from(m), i64::from(d)), days);
        }
    }

    #[test]
    fn rules() {
        let offset = |rule: &str, utc| Rule::parse(rule).unwrap().offset_at(utc);
        let berlin = "CET-1CEST,M3.5.0,M10.5.0/3";
        // Switches of 2026: 29 March and 25 October, both at 01:00 UTC.
        assert_eq!(offset(berlin, 1_774_745_999), 3600);
        assert_eq!(offset(berlin, 1_774_746_000), 7200);
        assert_eq!(offset(berlin, 1_792_889_999), 7200);
        assert_eq!(offset(berlin, 1_792_890_000), 3600);
        // South of the equator summer spans the new year.
        let sydney = "AEST-10AEDT,M10.1.0,M4.1.0/3";
        assert_eq!(offset(sydney, 1_767_225_600), 39_600);
        assert_eq!(offset(sydney, 1_782_864_000), 36_000);
        assert_eq!(offset("<+0545>-5:45", 0), 20_700);
        assert_eq!(offset("UTC0", 0), 0);
        for bad in ["", "CET", "CET-1CEST", "CET-1CEST,M13.1.0,M1.1.0", "<+03", "CET-999"] {
            assert!(Rule::parse(bad).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn zone_files() {
        // Version 2 with one transition at 1000 from type 0 (+1 h) to type 1 (+2 h).
        let head = |counts: [u32; 6]| {
            let counts = counts.iter().flat_map(|c| c.to_be_bytes());
            b"TZif2".iter().copied().chain([0; 15]).chain(counts).collect::<Vec<u8>>()
        };
        let kind = |seconds: i32| [&seconds.to_be_bytes()[..], &[0, 0]].concat();
        let mut file = head([0, 0, 0, 0, 0, 0]);
        file.extend(head([0, 0, 0, 1, 2, 4]));
        file.extend(1000i64.to_be_bytes());
        file.push(1);
        file.extend([kind(3600), kind(7200), b"ABC\0".to_vec()].concat());
        let with_footer = [&file[..], b"\nXYZ-3\n"].concat();
        assert_eq!(offset_at(&with_footer, 999), Some(3600));
        assert_eq!(offset_at(&with_footer, 1000), Some(10_800));
        assert_eq!(offset_at(&[&file[..], b"\n\n"].concat(), 1000), Some(7200));
        for cut in 0..file.len() {
            assert_eq!(offset_at(&file[..cut], 1000), None);
        }
        assert!(LocalTime::now().year >= 2024);
    }
}
