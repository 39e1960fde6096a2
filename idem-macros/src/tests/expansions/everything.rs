/// Moves money.
#[must_use]
pub async fn transfer(
    __a0: State<Db>,
    __idem: foo::bar::__private::Idem<
        Json<Transfer>,
        foo::bar::__private::EngineInRouterState,
    >,
) -> foo::bar::__private::Guarded<Result<Json<Receipt>, Problem>> {
    let __policy: &'static foo::bar::__private::Policy = {
        const __IDEM_POLICY: foo::bar::__private::Policy = foo::bar::__private::Policy::new(
                foo::bar::__private::Anchor::all(
                    &[
                        foo::bar::__private::Anchor::header("Idempotency-Key"),
                        foo::bar::__private::Anchor::path("id"),
                        keys::NONCE,
                    ],
                ),
            )
            .ttl(::core::time::Duration::from_millis(5400000))
            .scope(
                foo::bar::__private::Scope::all(
                    &[
                        foo::bar::__private::Scope::header("X-Tenant"),
                        foo::bar::__private::Scope::query("shop"),
                    ],
                ),
            )
            .space("payments")
            .optional()
            .fingerprint(
                foo::bar::__private::FingerprintScheme::exclude(&["sent_at", "/a.b"])
                    .headers(&["x-version"]),
            )
            .record(foo::bar::__private::Recording::Final)
            .in_flight(
                foo::bar::__private::InFlight::Wait(
                    ::core::time::Duration::from_millis(5000),
                ),
            )
            .recover(|__request| foo::bar::__private::boxed(
                foo::bar::__private::recovered(bank::was_it_paid(__request)),
            ))
            .admit(|__request| foo::bar::__private::boxed(
                foo::bar::__private::admitted(within_quota(__request)),
            ))
            .lease(LEASE)
            .replay(
                foo::bar::__private::ReplayShape::new()
                    .status(foo::bar::__private::status(200))
                    .merge("{\"replayed\":true,\"event_id\":null}"),
            )
            .refusals(&problems::REFUSALS)
            .mode(foo::bar::__private::Mode::Observe)
            .store_outage(foo::bar::__private::StoreOutage::Open);
        &__IDEM_POLICY
    };
    if false {
        foo::bar::__private::check_engine::<App<Pg, Redis>>();
        foo::bar::__private::check_argument::<State<Db>, App<Pg, Redis>>();
        foo::bar::__private::check_last_argument::<Json<Transfer>, App<Pg, Redis>, _>();
    }
    {
        #[allow(unused_imports)]
        use foo::bar::__private::probe::Fallback as _;
        foo::bar::__private::probe::Of::<
            Result<Json<Receipt>, Problem>,
        >::idem_answer_is_complete();
    }
    {
        #[allow(unused_imports)]
        use foo::bar::__private::transaction::Fallback as _;
        const _: () = foo::bar::__private::transaction::none(
            foo::bar::__private::transaction::Of::<State<Db>>::COUNT,
        );
        const _: () = foo::bar::__private::transaction::none(
            foo::bar::__private::transaction::Of::<Json<Transfer>>::COUNT,
        );
    }
    foo::bar::__private::run(
            __idem,
            __policy,
            move |__last: Json<Transfer>| foo::bar::__private::boxed(async move {
                #[allow(
                    unreachable_code,
                    clippy::diverging_sub_expression,
                    clippy::empty_loop,
                    clippy::let_unit_value,
                    clippy::let_with_type_underscore,
                    clippy::needless_return,
                )]
                if false {
                    let __never: Result<Json<Receipt>, Problem> = loop {};
                    return __never;
                }
                let __args = (__a0, __last);
                let State(db) = __args.0;
                let Json(mut body) = __args.1;
                #[allow(unused_braces)]
                {
                    let policy = db.move_money(&mut body).await?;
                    Ok(Json(policy))
                }
            }),
        )
        .await
}
