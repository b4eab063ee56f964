//! Tables of what is kept, and a second, slower opinion on everything else.

use super::*;
use jiff::tz::Offset;
use proptest::prelude::*;

/// Central European time without a time zone database.
const BERLIN: &str = "CET-1CEST,M3.5.0,M10.5.0/3";

fn backup(sequence: u64, at: &str) -> DatedBackup {
    DatedBackup { id: format!("b{sequence}"), sequence, point_in_time: at.parse().unwrap() }
}

fn backups(times: &[&str]) -> Vec<DatedBackup> {
    (1..).zip(times).map(|(sequence, at)| backup(sequence, at)).collect()
}

fn rule(keep: Keep, time_zone: &str) -> RetentionRule {
    RetentionRule::new(keep, None, TimeZone::posix(time_zone).unwrap()).unwrap()
}

fn within(span: &str, time_zone: &str) -> RetentionRule {
    let span = span.parse().unwrap();
    RetentionRule::new(Keep::default(), Some(span), TimeZone::posix(time_zone).unwrap()).unwrap()
}

/// The reasons of each backup, oldest first.
fn reasons(rule: &RetentionRule, backups: &[DatedBackup]) -> Vec<String> {
    rule.decide(backups, Timestamp::MAX).iter().map(|decision| decision.reasons.join(", ")).collect()
}

#[test]
fn a_rule_that_keeps_nothing_is_refused() {
    let new = |within: Option<Span>| RetentionRule::new(Keep::default(), within, TimeZone::UTC).err();
    assert_eq!(new(None), Some(RuleError::Empty));
    assert_eq!(new(Some(Span::new())), Some(RuleError::Within));
    assert_eq!(new(Some(Span::new().days(-1))), Some(RuleError::Within));
    assert_eq!(new(Some(Span::new().days(1))), None);
    let negative = RetentionRule::new(Keep { keep_last: 1, ..Keep::default() }, "-1d".parse().ok(), TimeZone::UTC);
    assert_eq!(negative.err(), Some(RuleError::Within));
}

#[test]
fn the_newest_of_each_period_is_kept_and_says_why() {
    let all = backups(&[
        "2025-12-28T23:00:00Z",
        "2025-12-29T01:00:00Z",
        "2026-01-01T10:00:00Z",
        "2026-01-01T10:59:59Z",
        "2026-01-01T11:00:00Z",
    ]);
    let keep = |keep| reasons(&rule(keep, "UTC0"), &all);
    assert_eq!(keep(Keep { keep_last: 2, ..Keep::default() }), ["", "", "", "last", "newest, last"]);
    assert_eq!(
        keep(Keep { keep_hourly: 2, ..Keep::default() }),
        ["", "", "", "hourly 2026-01-01 10:00+00:00", "newest, hourly 2026-01-01 11:00+00:00"]
    );
    assert_eq!(
        keep(Keep { keep_daily: 2, ..Keep::default() }),
        ["", "daily 2025-12-29", "", "", "newest, daily 2026-01-01"]
    );
    // The week of New Year belongs to the year of its Thursday.
    assert_eq!(
        keep(Keep { keep_weekly: 9, ..Keep::default() }),
        ["weekly 2025-W52", "", "", "", "newest, weekly 2026-W01"]
    );
    assert_eq!(
        keep(Keep { keep_monthly: 9, keep_yearly: 1, ..Keep::default() }),
        ["", "monthly 2025-12", "", "", "newest, monthly 2026-01, yearly 2026"]
    );
}

#[test]
fn days_begin_where_the_rule_says() {
    let all = backups(&["2026-11-20T22:30:00Z", "2026-11-20T23:30:00Z"]);
    let daily = Keep { keep_daily: 2, ..Keep::default() };
    assert_eq!(reasons(&rule(daily, "UTC0"), &all), ["", "newest, daily 2026-11-20"]);
    assert_eq!(reasons(&rule(daily, BERLIN), &all), ["daily 2026-11-20", "newest, daily 2026-11-21"]);
}

#[test]
fn the_days_on_which_clocks_are_changed_have_23_and_25_hours() {
    let hourly = rule(Keep { keep_hourly: 9, ..Keep::default() }, BERLIN);
    // Back on 2026-10-25: 02:30 comes twice.
    assert_eq!(
        reasons(&hourly, &backups(&["2026-10-25T00:30:00Z", "2026-10-25T01:30:00Z", "2026-10-25T02:30:00Z"])),
        ["hourly 2026-10-25 02:00+02:00", "hourly 2026-10-25 02:00+01:00", "newest, hourly 2026-10-25 03:00+01:00"]
    );
    // Forward on 2026-03-29: after 01:30 comes 03:30.
    assert_eq!(
        reasons(&hourly, &backups(&["2026-03-29T00:30:00Z", "2026-03-29T01:30:00Z"])),
        ["hourly 2026-03-29 01:00+01:00", "newest, hourly 2026-03-29 03:00+02:00"]
    );
    let daily = rule(Keep { keep_daily: 9, ..Keep::default() }, BERLIN);
    // From midnight to midnight: 25 hours of one day, then the next.
    assert_eq!(
        reasons(&daily, &backups(&["2026-10-24T22:00:00Z", "2026-10-25T22:59:59Z", "2026-10-25T23:00:00Z"])),
        ["", "daily 2026-10-25", "newest, daily 2026-10-26"]
    );
    // A day is a calendar day: 25 hours before 12:00 it was 12:00.
    let times = backups(&["2026-10-24T09:59:59Z", "2026-10-24T10:00:00Z", "2026-10-25T11:00:00Z"]);
    assert_eq!(reasons(&within("1d", BERLIN), &times), ["", "within 1d", "newest, within 1d"]);
    assert_eq!(reasons(&within("24h", BERLIN), &times), ["", "", "newest, within 24h"]);
}

#[test]
fn a_day_that_comes_twice_counts_once() {
    // Clocks go back at 00:01, to 23:01 of the day before.
    let zone = "NST3:30NDT,M3.2.0/0:01,M11.1.0/0:01";
    let all = backups(&["2026-11-01T02:30:30Z", "2026-11-01T02:40:00Z", "2026-11-01T03:40:00Z"]);
    let daily = Keep { keep_daily: 2, ..Keep::default() };
    assert_eq!(reasons(&rule(daily, zone), &all), ["", "daily 2026-10-31", "newest, daily 2026-11-01"]);
}

#[test]
fn ages_count_from_the_newest_backup_but_not_from_the_future() {
    let mut all = backups(&["2026-01-01T00:00:00Z", "2026-01-10T00:00:00Z", "2026-01-12T00:00:00Z"]);
    let rule = within("3d", "UTC0");
    // Years later nothing more is lost.
    let later = rule.decide(&all, "2030-01-01T00:00:00Z".parse().unwrap());
    assert_eq!(later.iter().map(Decision::is_kept).collect::<Vec<_>>(), [false, true, true]);
    // A clock that was wrong once.
    all.push(backup(4, "2099-01-01T00:00:00Z"));
    let now = rule.decide(&all, "2026-01-12T01:00:00Z".parse().unwrap());
    assert_eq!(now.iter().map(Decision::is_kept).collect::<Vec<_>>(), [false, true, true, true]);
    assert!(within("9000y", "UTC0").decide(&all, Timestamp::MAX).iter().all(Decision::is_kept));
}

#[test]
fn the_head_of_the_chain_stays_when_its_clock_was_behind() {
    let all = backups(&["2026-01-10T00:00:00Z", "2026-01-11T00:00:00Z", "2020-01-01T00:00:00Z"]);
    let decisions = rule(Keep { keep_last: 1, ..Keep::default() }, "UTC0").decide(&all, Timestamp::MAX);
    let kept: Vec<_> = decisions.iter().map(|decision| (&*decision.id, decision.reasons.join(", "))).collect();
    assert_eq!(kept, [("b3", "newest".into()), ("b1", String::new()), ("b2", "last".into())]);
}

#[test]
fn no_backups_no_decisions() {
    assert_eq!(rule(Keep { keep_last: 1, ..Keep::default() }, "UTC0").decide(&[], Timestamp::MAX), []);
}

/// Numbers of the hour, day, week, month and year of a local time, by arithmetic alone.
fn numbers(local_seconds: i64) -> [i64; 5] {
    let days = local_seconds.div_euclid(86_400);
    // Years begin in March here, so that the day of the leap year is the last one.
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let months = (era * 400 + year_of_era) * 12 + march_month + 2;
    // The first day of 1970 was a Thursday.
    [local_seconds.div_euclid(3600), days, (days + 3).div_euclid(7), months, months.div_euclid(12)]
}

/// The rule as people would say it, one backup at a time against all others.
fn is_kept(backup: &DatedBackup, all: &[DatedBackup], keep: &Keep, hours: Option<i64>, offset: i64) -> bool {
    let order = |other: &DatedBackup| (other.point_in_time, other.sequence, other.id.clone());
    let newer: Vec<_> = all.iter().filter(|other| order(other) > order(backup)).collect();
    let head = all.iter().all(|other| (other.sequence, &other.id) <= (backup.sequence, &backup.id));
    let age = all.iter().map(|other| (other.point_in_time - backup.point_in_time).get_seconds()).max();
    let of = |backup: &DatedBackup| numbers(backup.point_in_time.as_second() + offset);
    let limits = [keep.keep_hourly, keep.keep_daily, keep.keep_weekly, keep.keep_monthly, keep.keep_yearly];
    let in_period = (0..limits.len()).any(|kind| {
        let mine = of(backup)[kind];
        let later: std::collections::BTreeSet<_> = newer.iter().map(|other| of(other)[kind]).collect();
        !later.contains(&mine) && later.len() < limits[kind] as usize
    });
    head || newer.len() < keep.keep_last as usize
        || hours.is_some_and(|hours| age.is_some_and(|age| age <= hours * 3600))
        || in_period
}

fn any_backups() -> impl Strategy<Value = Vec<DatedBackup>> {
    // Close together, so that they share hours and days, and far apart; minutes, so that some are equal.
    let minute = prop_oneof![0_i64..120, 0_i64..60 * 24 * 10, 0_i64..60 * 24 * 1500];
    proptest::collection::vec((minute, 0_u64..20), 0..40).prop_map(|drawn| {
        let dated = |(number, (minute, sequence)): (usize, (i64, u64))| DatedBackup {
            id: format!("id{number}"),
            sequence,
            point_in_time: Timestamp::from_second(1_700_000_000 + minute * 60).unwrap(),
        };
        drawn.into_iter().enumerate().map(dated).collect()
    })
}

fn any_keep() -> impl Strategy<Value = Keep> {
    proptest::array::uniform6(prop_oneof![3 => Just(0_u32), 3 => 0_u32..6, 1 => Just(u32::MAX)]).prop_map(
        |[keep_last, keep_hourly, keep_daily, keep_weekly, keep_monthly, keep_yearly]| Keep {
            keep_last,
            keep_hourly,
            keep_daily,
            keep_weekly,
            keep_monthly,
            keep_yearly,
        },
    )
}

proptest! {
    #[test]
    fn decisions_are_those_of_the_model(
        (all, shuffled) in any_backups().prop_flat_map(|all| (Just(all.clone()), Just(all).prop_shuffle())),
        keep in any_keep(),
        hours in proptest::option::of(1_i64..2000),
        offset in -14_i32..=14,
    ) {
        let zone = TimeZone::fixed(Offset::constant(0).saturating_add(Span::new().hours(offset)));
        let span = hours.map(|hours| Span::new().hours(hours));
        let Ok(rule) = RetentionRule::new(keep, span, zone) else {
            prop_assert!(keep == Keep::default() && hours.is_none());
            return Ok(());
        };
        let decisions = rule.decide(&all, Timestamp::MAX);
        prop_assert_eq!(&decisions, &rule.decide(&shuffled, Timestamp::MAX), "the order of the input matters");
        prop_assert_eq!(decisions.len(), all.len());
        for backup in &all {
            let decision = decisions.iter().find(|decision| decision.id == backup.id).unwrap();
            let expected = is_kept(backup, &all, &keep, hours, i64::from(offset) * 3600);
            prop_assert_eq!(decision.is_kept(), expected, "{:?}", (backup, decision));
        }
        let by_time = all.iter().max_by_key(|backup| (backup.point_in_time, backup.sequence, &backup.id));
        if let Some(newest) = by_time {
            prop_assert!(decisions.last().unwrap().id == newest.id && decisions.last().unwrap().is_kept());
        }
    }
}
